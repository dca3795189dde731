"""From scores and a budget to a verified plan: ranking, allocation, plan search, latency targets."""
