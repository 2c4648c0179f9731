"""What text policies and text rollout engines share: model folders, token batches, the KV caches of both."""
