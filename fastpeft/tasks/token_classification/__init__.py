"""Token classification: entities in sentences of words, tagged in IOB2."""
