"""The layered executors: the meta-step layer by layer, all tasks at once."""
