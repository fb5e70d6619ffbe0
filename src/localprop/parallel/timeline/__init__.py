"""When processes that train together compute, wait and send."""
