"""What a run tells: what it records beside its weights, advice while it runs, trackers, the page, runs side by side.

Nothing is imported here: the command line declares its options without torch.
"""
