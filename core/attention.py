"""Cross-attention maps of tokens and words, under a short name for notebooks: see `core.activations.attention`."""

from core.activations.attention import AttentionRecording, WordMaps, record_attention, word_maps

__all__ = ["AttentionRecording", "WordMaps", "record_attention", "word_maps"]
