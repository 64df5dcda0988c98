"""The topics of the bus."""

from feedback.bus.contract import TopicSpec

SAMPLES = "alignd.samples.v1"
RANKINGS = "alignd.rankings.v1"
DEMONSTRATIONS = "alignd.demonstrations.v1"
POLICIES = "alignd.policies.v1"
DEAD_LETTERS = "alignd.dead_letters.v1"

# Feedback is keyed by sample id. Policy events are keyed by event id: compaction, without which Kafka does not keep a
# topic for ever, then finds nothing to remove.
TOPICS = (
    TopicSpec(SAMPLES, partitions=4),
    TopicSpec(RANKINGS, partitions=4),
    TopicSpec(DEMONSTRATIONS, partitions=4),
    TopicSpec(POLICIES, partitions=1, compacted=True),
    TopicSpec(DEAD_LETTERS, partitions=4),
)

# The topics of what users asked for and said.
FEEDBACK_TOPICS = (SAMPLES, RANKINGS, DEMONSTRATIONS)
# The topics that ingest reads: also what relays gave up, so that the store tells of it.
INGESTED_TOPICS = (*FEEDBACK_TOPICS, DEAD_LETTERS)
