"""What runs plans on a device: the CPU, or a CUDA GPU."""
