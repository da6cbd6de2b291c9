"""Frozen encoders judged: who (`subject`), on which pictures (`layouts`, `pictures`), one module a task."""
