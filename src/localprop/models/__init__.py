"""Where a backbone comes from: a plugin that has registered it, or timm."""
