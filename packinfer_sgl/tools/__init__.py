"""What the commands of ``packinfer-sgl`` do."""
