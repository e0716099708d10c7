"""The engine: takes a method through a stream, and saves, resumes and measures it."""
