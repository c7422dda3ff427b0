from pydoc_data.topics import topics

from aptq.data.pydoc import calibration_topics, evaluation_topics


def test_every_fourth_topic_is_for_evaluation() -> None:
    names = sorted(topics)
    evaluation = evaluation_topics()
    assert len(evaluation) == len(names) // 4
    assert evaluation[0].split() == topics[names[3]].split()
    assert 0 < len(calibration_topics()) <= len(names) - len(evaluation)


def test_calibration_and_evaluation_share_no_paragraph() -> None:
    judged = {paragraph for topic in evaluation_topics() for paragraph in topic.split("\n\n")}
    calibrated = [paragraph for topic in calibration_topics() for paragraph in topic.split("\n\n")]
    assert judged.isdisjoint(calibrated)
    assert len(calibrated) == len(set(calibrated))


def test_there_is_enough_for_a_demonstration() -> None:
    assert sum(map(len, calibration_topics())) > 200_000
    assert sum(map(len, evaluation_topics())) > 40_000
