"""A search: a sweep that chooses the values itself, stops bad trials early, and shows what it has found."""
