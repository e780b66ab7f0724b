"""Conversations and instructions: a language model learns what the assistant says."""
