"""What a configuration asks for: tasks, paths, keys and resources."""
