"""From a batch to a plan: who shares what, which spans are read once, and the work items. No SGLang, no GPU."""
