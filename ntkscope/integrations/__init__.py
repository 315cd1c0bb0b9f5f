"""Recording inside other people's training loops, and logging with their loggers; each file needs the library it is named after."""
