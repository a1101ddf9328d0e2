"""One run on several processes: every batch divided among them, the stages divided among them, or both."""
