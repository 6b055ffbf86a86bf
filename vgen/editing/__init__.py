"""Editing of existing clips: what is asked for, how a clip is fitted to a model, and what an edit takes over."""
