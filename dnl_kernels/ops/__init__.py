"""The operators. `ops/<op>/api.py` is the public function, `ops/<op>/reference.py` its meaning."""
