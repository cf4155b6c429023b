"""What `benchmarks/reproduce.py` runs (methods), measures, concludes (claims) and writes (report, page.md)."""
