"""From files to clean documents: collect, clean, dedupe, contamination; `prepare` runs them all."""
