"""What `recipes/studies/compare.py` is made of: tasks, methods, cells, results."""
