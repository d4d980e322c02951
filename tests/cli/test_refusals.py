"""What the commands refuse: status 2, and one line that names the option or the file."""

import re
import shlex

import pytest

from dllm_rl.cli.main import main
from dllm_rl.models.tiny import tiny_masked_lm

# The words of a command, and what its line says. MODEL is a checkpoint, the present folder is empty.
REFUSED = [
    ("sample '' 1", "='' is empty; give a file or folder"),
    ("evaluate model '' --task sudoku", "='' is empty; give a file or folder"),
    ("evaluate model --task sudoku --path ''", "='' is empty; give a file or folder"),
    ("evaluate model --task sudoku --output_dir ''", "='' is empty; give a file or folder"),
    ("grade '' --task sudoku", "='' is empty; give a file or folder"),
    ("doctor ''", "='' is empty; give a file or folder"),
    ("verify ''", "='' is empty; give a file or folder"),
    ("sample . 1 --quantization.group_size 32", "--quantization.group_size is not an option of this command"),
    ("doctor . --quantization.group_size 64", "--quantization.group_size needs --quantization, the class with"),
    ("doctor . --rank.temperature 0.5", "--rank.temperature needs --rank, the class with this setting"),
    ("doctor . --commit.tau 0.7", "--commit.tau is not an option of this command"),
    ("evaluate . --commit.tau 0.7", "--commit.tau needs --commit, the class with this setting"),
    ("verify . --cache.refresh 4", "--cache.refresh is not an option of this command"),
    ("sample MODEL 1 --rank best", "(Confidence, MaxProb, Margin, Entropy, RandomOrder, LeftToRight, PlackettLuce)"),
    ("sample MODEL 1 --rank best", "rank='best' is not known (Confidence, "),
    ("sample MODEL 1 --commit Threshold", "--commit Threshold needs --commit.tau"),
    ("sample MODEL 1 --commit Schedule --commit.tau 3", "--commit.tau is not a setting of Schedule; leave it out"),
    ("sample MODEL 1 --commit Threshold --commit.tau x", "--commit Threshold: tau='x' is of type str; give float"),
    ("sample MODEL 1 --commit Threshold --commit.tau=[1", "--commit Threshold: tau='[1' is not YAML"),
    ("sample MODEL 1 --commit Threshold --commit.tau none", "--commit Threshold: tau='none' is of type str"),
    ("sample MODEL 1 --commit Threshold --commit.tau 2e0", "--commit Threshold: tau=2.0 must lie in (0, 1]"),
    ("sample MODEL 1 --commit.tau 0.5", "--commit.tau needs --commit, the class with this setting"),
    ("sample MODEL 1 --rank PlackettLuce --rank.temperature 1 --rank.base_rank Best", "base_rank='Best' is not"),
    ("sample MODEL 1 --cache half", "cache='half' is not known (BlockCache, "),
    ("sample MODEL 1 --cache BlockCache --cache.refresh 2", "--cache.refresh is not a setting of BlockCache"),
    ("sample MODEL 1 --max_new_tokens 900", "max_new_tokens=900"),
    (
        "sample . 1= --make_model no_such_module:f",
        "--make_model='no_such_module:f': No module named 'no_such_module'; ",
    ),
    ("sample . 1= --make_model own_module:missing", "module 'own_module' has no attribute 'missing'"),
    ("sample . 1= --make_model platform:node", "'platform:node' makes a str, not a policy; return make_policy(...)"),
    ("evaluate .", "task"),
    ("evaluate --task sudoku", "evaluate needs a MODEL"),
    ("evaluate MODEL", "error: task"),
    ("evaluate no/such/model --task sudoku", "no/such/model"),
    ("evaluate . --task sudoku", "config.json"),
    ("evaluate MODEL --task chess", "task='chess'"),
    ("evaluate MODEL --task sudoku --protocol d2", "protocol='d2'"),
    ("evaluate MODEL --task countdown --set reward_rule=hard", "reward_rule='hard' must be one of 'own', 'd1'"),
    ("evaluate MODEL --task sudoku --set clue=3", "--set clue=3"),
    ("evaluate MODEL --task sudoku --set clues=ten", "clues='ten' must be a tuple"),
    ("evaluate MODEL --task sudoku --path nowhere.csv", "nowhere.csv"),
    ("evaluate MODEL --task sudoku --output_dir /dev/null/x", "--output_dir '/dev/null/x'"),
    ("evaluate MODEL --task sudoku --limit 0", "limit=0"),
    ("evaluate MODEL --task sudoku --set side=9", "clues=(10, 12)"),
    ("evaluate MODEL --task sudoku --diffusion_steps 8,99", "diffusion_steps=99"),
    ("evaluate MODEL --task sudoku --samples 0", "samples=0"),
    ("evaluate MODEL --task sudoku --samples 4 --majority 2,8", "--majority 8 needs --samples 8"),
    ("evaluate MODEL --task sudoku --samples 4 --majority 4", "a grader that says which answers are equal"),
    ("evaluate MODEL --task sudoku --diffusion_steps 4,3 --block_size 5", "diffusion_steps=3"),
    ("evaluate MODEL --task sudoku --samples 4", "samples=4"),
    ("evaluate MODEL --task sudoku --diffusion_steps 4,2 --block_size 4", "diffusion_steps=2"),
    ("evaluate MODEL --task sudoku --quantization none,fp8", "quantization='fp8'"),
    ("evaluate MODEL --task sudoku --rank MaxProb,best", "rank='best'"),
    ("evaluate MODEL --task sudoku --commit Schedule,Threshold", "--commit Threshold needs --commit.tau"),
    ("evaluate MODEL --task sudoku --cache none,all", "cache='all'"),
    ("evaluate MODEL --task sudoku --lengths 100", "max_new_tokens=100"),
    ("evaluate MODEL --task sudoku --set prompt_format=text", "chat template"),
    ("evaluate MODEL --task sudoku --set prompt_format=text --set chat=false", "cannot be tokenized"),
    ("doctor . --num_prompts 3", "--num_prompts: it is for a run's folder, or with --task; leave it out"),
    ("doctor . --task sudoku --quick", "--quick: a run's folder has no such check; leave it out"),
    ("doctor . --sections text sampling", "--sections sampling is not one of text, sampler"),
    ("doctor . --quick --sections text", "give one of them"),
    ("doctor . --quantization none", "--quantization none has no copy to measure"),
    ("serve model --port 0 --host 0.0.0.0", "host='0.0.0.0' is open to other machines, and needs a token"),
    ("serve model --port 0 --allow_updates", "allow_updates lets requests replace the weights, and needs a token"),
    ("serve model --port 0 --token_file missing", "error: missing: No such file or directory"),
    ("serve model --port 0 --token_file ''", "error: token_file='' is empty"),
    ("serve model --port 0 --commit Threshold", "error: --commit Threshold needs --commit.tau"),
    ("serve model --port 0 --max_new_tokens 0", "max_new_tokens=0 fills in a prompt, which the server does not do"),
    ("serve model --port 0 --quantization fp9", "error: quantization='fp9' is not known (FakeQuantize"),
    ("serve model --port 0 --cache best", "error: cache='best' is not known (BlockCache"),
    ("serve MODEL --port 0 --max_new_tokens 4 --diffusion_steps 8", "diffusion_steps=8 is more than the 4 tokens of"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tiny_masked_lm(characters="0123456789+-*/(),>.= ", **sizes).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=[f"{words}: {said}" for words, said in REFUSED])
def test_a_command_says_in_one_line_what_is_wrong(words, said, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DLLM_RL_TOKEN", raising=False)
    assert main([model if word == "MODEL" else word for word in shlex.split(words)]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and re.fullmatch(r"error: [^\x1b\n]+\n", shown.err) and shown.out == ""
    assert not any(tmp_path.iterdir()), "a refused command leaves nothing"


# What the parser of the options refuses, by the option and its text.
PARSED = [
    *(("serve model --port", text) for text in ("65536", "-1", "99999999999999999999", "80.5", "http")),
    *(("serve model --max_batch_size", "0"), ("serve model --timeout", "none"), ("serve model --client_timeout", "-1")),
    *(("evaluate MODEL --task sudoku --lengths", text) for text in ("0", "128,x")),
    ("evaluate MODEL --task sudoku --split", "dev"),
    *(("evaluate MODEL --task sudoku --reward_timeout", text) for text in ("x", "0")),
]
REMEDIES = {
    "--port": "must be a port from 1 to 65535, or 0 for any free one",
    "--reward_timeout": "must be seconds above 0, or none",
}


@pytest.mark.parametrize(("words", "text"), PARSED)
def test_the_parser_names_the_option_and_its_text(words, text, capsys):
    *command, option = words.split()
    with pytest.raises(SystemExit) as stopped:
        main([*command, f"{option}={text}"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and f"{option}: " in error and f"'{text}'" in error and " _" not in error
    assert REMEDIES.get(option, "") in error
