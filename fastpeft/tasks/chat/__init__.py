"""Conversations and instructions: a language model learns the assistant's turns."""
