"""What is measured: the same numbers for us and for the peer. No imports: both sides read it."""

# The 13.8 M-parameter Llama of shared/PEERS.md.
TRAIN = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "vocab_size": 8192,
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
}
BATCH, LENGTH = 8, 512

# TinyLlama-1.1B; random weights, as speed does not depend on them.
DECODE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
PROMPT = 128
LEARNING_RATE, MAX_NORM = 1e-4, 1.0
