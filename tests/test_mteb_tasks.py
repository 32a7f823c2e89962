"""Laws of mteb_tasks.py: which instruction stands where, for which task; MTEB itself is not needed."""

import pytest

from e5core.mteb_tasks import Told, instruct, members, read_table

OF_KINDS = {  # the 56 tasks of the paper's table 1, by its columns
    "Classification": (
        "AmazonCounterfactualClassification AmazonPolarityClassification AmazonReviewsClassification "
        "Banking77Classification EmotionClassification ImdbClassification MassiveIntentClassification "
        "MassiveScenarioClassification MTOPDomainClassification MTOPIntentClassification "
        "ToxicConversationsClassification TweetSentimentExtractionClassification"
    ),
    "Clustering": (
        "ArxivClusteringP2P ArxivClusteringS2S BiorxivClusteringP2P BiorxivClusteringS2S MedrxivClusteringP2P "
        "MedrxivClusteringS2S RedditClustering RedditClusteringP2P StackExchangeClustering StackExchangeClusteringP2P "
        "TwentyNewsgroupsClustering"
    ),
    "PairClassification": "SprintDuplicateQuestions TwitterSemEval2015 TwitterURLCorpus",
    "Reranking": "AskUbuntuDupQuestions MindSmallReranking SciDocsRR StackOverflowDupQuestions",
    "Retrieval": (
        "ArguAna ClimateFEVER CQADupstackRetrieval DBPedia FEVER FiQA2018 HotpotQA MSMARCO NFCorpus NQ QuoraRetrieval "
        "SCIDOCS SciFact Touche2020 TRECCOVID"
    ),
    "STS": "BIOSSES SICK-R STS12 STS13 STS14 STS15 STS16 STS17 STS22 STSBenchmark",
    "Summarization": "SummEval",
}
TASKS = [(kind, name) for kind, names in OF_KINDS.items() for name in names.split()]
FOREIGN = "what the caller or MTEB says"


def test_the_56_english_tasks_have_the_papers_instruction_whatever_mteb_says() -> None:
    assert len(TASKS) == 56
    for kind, name in TASKS:
        told = instruct(name, kind, FOREIGN, {})
        assert told.source == "the paper's" and told.instruction not in ("", FOREIGN), name
        assert told.on_documents == (kind != "Retrieval"), name
        assert told.normalize == (kind != "Classification"), name
    distinct = {instruct(name, kind, None, {}).instruction for kind, name in TASKS}
    assert len(distinct) == 56 - 9 - 1  # ten STS tasks have one, and the two of tweets


def test_instructions_are_the_papers_letter_by_letter() -> None:
    written = {
        ("Classification", "Banking77Classification"): "Given a online banking query, find the corresponding intents",
        ("Clustering", "RedditClustering"): "Identify the topic or theme of Reddit posts based on the titles",
        (
            "Clustering",
            "RedditClusteringP2P",
        ): "Identify the topic or theme of Reddit posts based on the titles and posts",
        ("Retrieval", "ArguAna"): "Given a claim, find documents that refute the claim",
        ("STS", "STS17"): "Retrieve semantically similar text.",
        ("BitextMining", "Tatoeba"): "Retrieve parallel sentences.",
        ("Retrieval", "MIRACLRetrieval"): "Given a question, retrieve Wikipedia passages that answer the question",
    }
    for (kind, name), instruction in written.items():
        assert instruct(name, kind, None, {}).instruction == instruction


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("ArguAna-PL", "ArguAna"),
        ("CQADupstackAndroidRetrieval", "CQADupstackRetrieval"),
        ("FEVERHardNegatives.v2", "FEVER"),
        ("NQHardNegatives", "NQ"),
        ("Touche2020Retrieval.v3", "Touche2020"),
    ],
)
def test_parts_and_later_versions_are_told_what_the_first_was(name: str, first: str) -> None:
    assert instruct(name, "Retrieval", FOREIGN, {}) == instruct(first, "Retrieval", FOREIGN, {})


def test_a_task_with_another_meaning_is_not_taken_for_one_that_its_name_begins_with() -> None:
    assert instruct("NQTablesRetrieval", "Retrieval", {"query": FOREIGN}, {}).instruction == FOREIGN


def test_the_callers_instruction_goes_before_the_papers_before_mtebs_before_that_of_the_kind() -> None:
    given = {"ArguAna": FOREIGN, "Other": "", "SciFact": "another task's"}
    assert instruct("ArguAna", "Retrieval", None, given).instruction == FOREIGN
    assert instruct("Other", "Retrieval", "MTEB's own", given) == Told("", "yours", False, True)
    assert instruct("Other", "STS", "MTEB's own", {}) == Told("MTEB's own", "MTEB's", True, True)
    for own in (None, "", {}):
        told = instruct("Other", "MultilabelClassification", own, {})
        assert told.instruction == read_table().kinds["MultilabelClassification"] and not told.normalize
        assert "--task Other=TEXT" in told.source


def test_candidates_have_the_instruction_in_the_papers_reranking_tasks_alone() -> None:
    assert instruct("AskUbuntuDupQuestions-VN", "Reranking", None, {}).on_documents
    for kind in ("Reranking", "InstructionReranking", "InstructionRetrieval"):
        assert not instruct("MIRACLReranking", kind, None, {}).on_documents


def test_tasks_that_are_not_of_text_are_refused() -> None:
    with pytest.raises(ValueError, match="CIFAR10: tasks of the kind ImageClassification are not for texts; known"):
        instruct("CIFAR10", "ImageClassification", None, {})


def test_groups_stand_for_mtebs_names_and_other_names_for_themselves() -> None:
    assert {name: members(name) for name in read_table().groups} == {
        "mteb-en": ("MTEB(eng, v1)",),
        "beir": ("BEIR",),
        "miracl": ("MIRACLRetrieval",),
        "bucc-tatoeba": ("BUCC", "Tatoeba"),
    }
    assert members("STS17") == ("STS17",)


def test_every_kind_that_a_rule_names_is_known() -> None:
    table = read_table()
    assert {*table.queries_only, *table.not_normalized} <= set(table.kinds)
    assert set(table.both_sides) <= set(table.tasks)
