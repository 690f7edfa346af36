"""The instruction budget: the loop that is counted, what is left out of it, and the model's arithmetic."""

import json
from pathlib import Path

import pytest

KERNELS = Path(__file__).parent / "kernels"
WAIT = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R6+URZ], R7"


@pytest.fixture(scope="module")
def sass(tool):
    return tool("sass_listing")


@pytest.fixture(scope="module")
def budget(tool):
    return tool("sass_budget")


def listing(*lines: str, name: str = "kernel") -> str:
    """What `nvdisasm -c` prints for these labels (ending in a colon) and instructions."""
    text = [f'\t.section\t.text.{name},"ax",@progbits', f"{name}:", f".text.{name}:"]
    address = 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            text.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    return "\n".join(text)


def consumer_loop(*body: str) -> list[str]:
    return ["MOV R0, RZ", ".L_x_1:", *["OMMA R0, R1"] * 4, "MUFU.EX2 R1, R1", *body, "@P0 BRA `(.L_x_1)", "EXIT"]


def consumer(sass, budget, *body: str):
    """The count of the loop with these lines in it."""
    return budget.attention_loops(sass.parse(listing(*consumer_loop(*body))), 4)[0]


def test_instructions_are_read_with_guards_and_remarks(sass):
    (function,) = sass.parse(
        listing("@!P0 LDL R6, [R1]", "BRA.U.ANY `(.L_x_0)", ".L_x_0:", "EXIT").replace("[R1] ;", '[R1] ; (*"Spill"*)')
    )
    load, branch, end = function.instructions(range(len(function.blocks)))
    assert (load.address, load.guard, load.opcode, load.root) == (0, "@!P0", "LDL", "LDL")
    assert (branch.opcode, branch.target) == ("BRA.U.ANY", ".L_x_0")
    assert end.opcode == "EXIT"


def test_products_in_mxfp8_take_the_tensor_pipe_as_long(sass, budget):
    lines = [line.replace("OMMA", "QMMA") for line in consumer_loop()]
    counted, _ = budget.attention_loops(sass.parse(listing(*lines)), 4)
    assert (counted.turn.classes["QMMA"], counted.turn.classes["OMMA"]) == (4, 0)
    fp4 = budget.predict(consumer(sass, budget).turn, 4)
    mxfp8 = budget.predict(counted.turn, 4)
    assert (mxfp8.tensor, mxfp8.issue) == (fp4.tensor, fp4.issue)


def test_a_loop_within_a_loop_is_counted_without_the_outer_one(sass, budget):
    outer = [".L_x_0:", *consumer_loop("FADD R1, R1")[:-1], "OMMA R0, R1", "@P1 BRA `(.L_x_0)", "EXIT"]
    counted, correction = budget.attention_loops(sass.parse(listing(*outer)), 4)
    assert counted.label == ".L_x_1"
    assert counted.turn.instructions == 7
    assert correction is None


def test_of_two_softmax_loops_the_one_without_masks_is_counted(sass, budget):
    masked = [line.replace("_1", "_2") for line in consumer_loop("FSEL R1, R1", "FSEL R1, R1")[:-1]]
    counted, _ = budget.attention_loops(sass.parse(listing(*masked, *consumer_loop("FADD R1, R1"))), 4)
    assert counted.label == ".L_x_1"


def test_the_correction_loop_is_the_one_without_exponentials(sass, budget):
    correction = [".L_x_7:", *["OMMA R0, R1"] * 2, "FADD R1, R1", "@P0 BRA `(.L_x_7)"]
    loops = budget.attention_loops(sass.parse(listing(*correction, *consumer_loop())), 4)
    assert [loop.label for loop in loops] == [".L_x_1", ".L_x_7"]


def test_loops_of_all_functions_are_searched(sass, budget):
    text = listing("EXIT", name="other") + "\n" + listing(*consumer_loop())
    assert budget.attention_loops(sass.parse(text), 4)[0].label == ".L_x_1"


def test_a_branch_past_blocks_without_mma_makes_them_a_detour(sass, budget):
    counted = consumer(sass, budget, "@!P1 BRA `(.L_x_2)", "FMUL R1, R1", "FMUL R1, R1", ".L_x_2:", "FADD R1, R1")
    assert counted.detours == {"0070": 2}
    assert counted.turn.classes["FMUL"] == 0
    assert counted.turn.classes["FADD"] == 1


def test_a_vote_makes_a_branch_conditional(sass, budget):
    counted = consumer(sass, budget, "BRA.DIV UR5, `(.L_x_2)", "FADD R1, R1", ".L_x_2:")
    assert counted.detours == {"0070": 1}


def test_waiting_again_out_of_line_is_a_detour(sass, budget):
    lines = consumer_loop(WAIT, "@!P0 BRA `(.L_x_8)", ".L_x_2:", "FADD R1, R1")
    again = [".L_x_8:", WAIT, "@!P0 BRA `(.L_x_8)", "BRA `(.L_x_2)"]
    counted, _ = budget.attention_loops(sass.parse(listing(*lines, *again)), 4)
    assert counted.detours == {".L_x_8": 3}
    assert counted.turn.classes["barrier"] == 1
    assert counted.turn.classes["FADD"] == 1


def test_waiting_in_place_is_counted_once(sass, budget):
    counted = consumer(sass, budget, ".L_x_3:", WAIT, "@!P0 BRA `(.L_x_3)", "FADD R1, R1")
    assert counted.detours == {}
    assert counted.turn.classes["barrier"] == 1


def test_a_branch_past_useful_mma_makes_no_detour(sass, budget):
    body = ["@!P1 BRA `(.L_x_2)", "OMMA R0, R1", ".L_x_2:"]
    counted, _ = budget.attention_loops(sass.parse(listing(*consumer_loop(*body))), 5)
    assert counted.detours == {}
    assert counted.turn.classes["OMMA"] == 5


def test_doing_part_of_a_turn_again_is_a_detour(sass, budget):
    again = [".L_x_2:", "OMMA R0, R1", "MUFU.EX2 R1, R1", "@P2 BRA `(.L_x_2)"]
    counted = consumer(sass, budget, "@!P1 BRA `(.L_x_3)", *again, ".L_x_3:", "FADD R1, R1")
    assert counted.detours == {".L_x_2": 3}
    assert counted.turn.classes["OMMA"] == 4
    assert counted.turn.classes["FADD"] == 1


def test_of_two_ways_without_mma_the_longer_one_is_counted(sass, budget):
    ways = ["@!P1 BRA `(.L_x_2)", "FMUL R1, R1", "BRA `(.L_x_3)", ".L_x_2:", *["FADD R1, R1"] * 3, ".L_x_3:"]
    counted = consumer(sass, budget, *ways)
    assert counted.turn.classes["FADD"] == 3
    assert counted.turn.classes["FMUL"] == 0


def test_of_two_ways_without_mma_the_one_that_hands_the_tile_back_is_counted(sass, budget):
    """The other one takes the same tile again."""
    arrive = "@!P0 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R6+URZ+0x50], RZ"
    ways = ["@!P1 BRA `(.L_x_2)", *["FMUL R1, R1"] * 9, "BRA `(.L_x_3)", ".L_x_2:", arrive, ".L_x_3:", "FADD R1, R1"]
    counted = consumer(sass, budget, *ways)
    assert counted.turn.classes["barrier"] == 1
    assert counted.turn.classes["FMUL"] == 0
    assert counted.detours == {"0070": 10}


def test_what_follows_a_way_out_of_the_loop_is_counted(sass, budget):
    counted, _ = budget.attention_loops(
        sass.parse(listing(*consumer_loop("@P2 BRA `(.L_x_9)", "FADD R1, R1"), ".L_x_9:", "EXIT")), 4
    )
    assert counted.turn.classes["FADD"] == 1
    assert counted.detours == {}


@pytest.mark.parametrize(
    ("opcode", "cycles"),
    [
        *[("LDSM.16.M88.4", 4), ("LDSM.16.M88.2", 2), ("LDSM.16.MT88", 1)],
        *[("LDS.128", 4), ("LDS.64", 2), ("LDS", 1), ("LDS.U.128", 4), ("LDS.U8", 1), ("STS.128", 4), ("LDG.E.128", 0)],
    ],
)
def test_shared_memory_cycles_follow_the_width(sass, budget, opcode, cycles):
    assert budget.wavefronts(sass.Instruction(0, "", opcode, "R0, [R1]")) == cycles


def test_the_model_gives_the_public_kernel_its_published_share(budget):
    public = budget.PUBLIC[128]
    others = public.instructions - sum(public.classes.values())
    prediction = budget.predict(budget.Cost({**public.classes, budget.OTHER: others}, 0), 64)
    assert (prediction.tensor, prediction.special, prediction.issue) == (2048, 1312, 1592)
    assert prediction.equal_overlap == pytest.approx(0.62, abs=0.001)


@pytest.mark.parametrize(
    ("classes", "wavefronts", "equal", "full", "bound_by"),
    [
        ({"OMMA": 72, "MUFU": 60, "other": 300}, 100, 2048 / (2304 + 0.79 * 960), 2048 / 2304, "tensor"),
        ({"OMMA": 64, "MUFU": 200, "other": 0}, 0, 2048 / (2048 + 0.79 * 3200), 2048 / 3200, "special function"),
        ({"OMMA": 64, "MUFU": 0, "other": 1500}, 0, 2048 / (2048 + 0.79 * 3000), 2048 / 3128, "issue"),
        ({"OMMA": 64, "MUFU": 0, "other": 0}, 400, 2048 / (2048 + 0.79 * 3200), 2048 / 3200, "shared memory"),
    ],
)
def test_the_model_takes_the_busiest_pipe(budget, classes, wavefronts, equal, full, bound_by):
    prediction = budget.predict(budget.Cost(classes, wavefronts), 64)
    assert prediction.equal_overlap == pytest.approx(equal)
    assert prediction.full_overlap == pytest.approx(full)
    assert prediction.bound_by == bound_by


def test_a_step_is_the_consumers_turn_and_its_share_of_the_correction(sass, budget):
    correction = [".L_x_7:", *["OMMA R0, R1"] * 8, "LDS.128 R1, [R2]", "@P0 BRA `(.L_x_7)"]
    functions = sass.parse(listing(*correction, *consumer_loop("LDS.64 R1, [R2]")))
    # 4 of 8 correction warps' turns for each consumer's; a turn of 32 rows and 32 keys is half a step.
    report = budget.make_report(functions, budget.Tiling(32, 32, 4, consumers=8, correctors=4), head_dim=128)
    assert report.step.classes["OMMA"] == 2 * (4 + 8 / 2)
    assert report.correction_share.classes["OMMA"] == 8
    assert report.step.wavefronts == 2 * (2 + 4 / 2)
    assert report.useful == 8


@pytest.mark.parametrize(("head_dim", "useful"), [(64, 32), (96, 48), (128, 64)])
def test_padding_of_the_head_dim_is_not_useful(budget, head_dim, useful):
    assert budget.useful_omma(32, 64, head_dim) == useful


@pytest.fixture
def run(budget, tmp_path, capsys):
    """Run the command on a listing; gives its exit status and what it printed."""

    def run(lines, *options):
        file = tmp_path / "kernel.sass"
        file.write_text(listing(*lines))
        status = budget.main([str(file), "--head-dim=128", "--useful=4", *options])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_the_command_prints_both_predictions_beside_the_public_kernel(run):
    status, out, _ = run(consumer_loop())
    assert status == 0
    assert "860" in out
    assert out.count("predicted at the public kernel's overlap") == 2
    assert out.count("bound at full overlap") == 2


def test_a_goal_that_is_missed_is_said_pipe_by_pipe(run, tmp_path):
    _, out, _ = run(consumer_loop(*["LDS.128 R1, [R2]"] * 9, "NOP"), f"--output={tmp_path / 'report.txt'}")
    assert "goal: 72% at the public kernel's overlap asks" in out
    assert "wavefronts a step are too many; S alone would hold it at" in out
    written = (tmp_path / "report.txt").read_text()
    assert written.startswith(out.rstrip())
    assert "kernel.sass, SHA-256" in written
    _, out, _ = run(["MOV R0, RZ", ".L_x_1:", *["OMMA R0, R1"] * 4, "MUFU.EX2 R1, R1", "@P0 BRA `(.L_x_1)", "EXIT"])
    assert "is met" in out


def test_the_command_prints_json(run):
    status, out, _ = run(consumer_loop("@!P1 BRA `(.L_x_2)", "FMUL R1, R1", ".L_x_2:"), "--json")
    report = json.loads(out)
    assert status == 0
    assert report["step"]["classes"]["OMMA"] == 4
    assert report["consumer"]["detours"] == {"0070": 1}
    assert set(report["prediction"]) >= {"tensor", "special", "issue", "shared", "equal_overlap", "full_overlap"}


@pytest.mark.parametrize(
    ("option", "status"),
    [("--max-instructions=6", 0), ("--max-instructions=5", 1), ("--max-mufu=1", 0), ("--max-mufu=0", 1)],
)
def test_over_budget_is_exit_status_1_and_named(run, option, status):
    result, _, err = run(consumer_loop(), option)
    assert result == status
    assert ("over budget" in err) == bool(status)


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["FADD R0, R1", "EXIT"], [], "no loop has MUFU.EX2 and 4 OMMA (most: 0)"),
        (consumer_loop(), ["--useful=5"], "5 OMMA (most: 4)"),
        (["BRA `(.L_x_5)", "EXIT"], [], "unknown label .L_x_5"),
    ],
)
def test_what_can_not_be_counted_is_exit_status_2_and_named(run, lines, options, message):
    status, _, err = run(lines, *options)
    assert status == 2
    assert message in err


def test_something_else_than_a_listing_is_named(budget, tmp_path, capsys):
    file = tmp_path / "kernel.sass"
    file.write_text("not a listing")
    assert budget.main([str(file), "--head-dim=128"]) == 2
    assert "nvdisasm -c" in capsys.readouterr().err


def test_a_compiled_kernel_is_counted(sass, budget, tool, nvrtc_12_8, tmp_path):
    cubin = tmp_path / "fp4_loop.cubin"
    source = (KERNELS / "fp4_loop.cu").read_text()
    cubin.write_bytes(nvrtc_12_8.compile("fp4_loop.cu", source, {}, ["-arch=sm_120a"]))
    if tool("disassembly").find_nvdisasm() is None:
        pytest.skip("nvdisasm is not installed (pip install nvidia-cuda-nvdisasm)")
    functions = sass.parse(budget.read_listing(cubin))
    counted, correction = budget.attention_loops(functions, 4)
    assert (counted.turn.classes["OMMA"], counted.turn.classes["MUFU"], counted.turn.wavefronts) == (4, 2, 4)
    assert (correction.turn.classes["OMMA"], correction.turn.classes["MUFU"]) == (2, 0)
    assert sum(counted.detours.values()) >= 20  # four square roots and eight products
    assert counted.turn.classes["FMUL"] == 0
