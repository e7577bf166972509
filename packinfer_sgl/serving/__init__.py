"""SGLang's side: what a batch is, who runs it, and what is counted."""
