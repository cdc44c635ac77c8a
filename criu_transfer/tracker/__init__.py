"""Write trackers: which pages a process wrote since they were last copied."""
