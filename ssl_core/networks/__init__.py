"""Networks: backbones, heads, batch norms, and the files of their weights."""
