"""`vllm-wsi`: encode, doctor, select, demo, init-checkpoint, train, study, eval."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_wsi import __version__

# Imports of torch, transformers and vLLM stay inside the commands: `--help` and errors answer at once.


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vllm-wsi", description="Slide language models on vLLM.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    encode = commands.add_parser("encode", help="slide images to feature files (extra: slides)")
    encode.add_argument("slides", nargs="+", type=Path, metavar="SLIDE", help="slide image, or folder of them")
    encode.add_argument(
        "--encoder",
        required=True,
        help="colour-texture (built in, for trying things out), a name such as uni2, conch, virchow2 or gigapath, "
        "hf-hub:OWNER/REPO, or a model's directory",
    )
    encode.add_argument("--out", type=Path, required=True, metavar="DIR", help="what is there already is skipped")
    encode.add_argument("--mpp", type=float, help="microns per pixel of the slides, instead of what they say")
    encode.add_argument("--patch-px", type=int, default=224, help="edge of a patch in pixels (default 224)")
    encode.add_argument("--patch-mpp", type=float, default=0.5, help="microns of such a pixel (default 0.5: 20x)")
    encode.add_argument("--tissue", default="otsu", choices=["otsu", "none"], help="by its distance from the glass, or "
                        "the whole slide (default otsu)")  # fmt: skip
    encode.add_argument("--channels", metavar="A,B,C", help="names or numbers from 0 of the three that are encoded as "
                        "red, green and blue, of fluorescence and the like (default: RGB alone)")  # fmt: skip
    encode.add_argument("--qc", type=Path, metavar="DIR", help="pictures of tissue and patches; where it is --out, the "
                        "viewer links them")  # fmt: skip
    encode.add_argument("--background", type=float, default=0.3, help="largest share beside the tissue (default 0.3)")
    encode.add_argument("--dtype", default="float16", choices=["float16", "float32"], help="(default float16)")
    encode.add_argument("--batch-size", type=int, default=32, help="patches encoded at once (default 32)")
    encode.add_argument("--workers", type=int, metavar="N", help="slides at once (default: by the encoder)")
    encode.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    encode.set_defaults(run=_encode)

    doctor = commands.add_parser("doctor", help="what is in a feature file, and what is wrong with it")
    doctor.add_argument("files", nargs="+", type=Path, metavar="FILE")
    doctor.add_argument("--encoder", help="which features, where a file holds several")
    doctor.add_argument("--checkpoint", metavar="C", help="directory or hub name: do the features fit it?")
    _add_encoder_mismatch(doctor)
    doctor.add_argument("--json", action="store_true", help="one JSON object for each file")
    doctor.set_defaults(run=_doctor)

    select = commands.add_parser("select", help="the patches that a checkpoint keeps of a slide, as JSON")
    select.add_argument("file", type=Path, metavar="FILE")
    select.add_argument("--checkpoint", required=True, help="directory or hub name")
    select.add_argument("-k", type=int, metavar="K", help="patches to keep (default: the checkpoint's)")
    select.add_argument("--encoder", help="which features, where a file holds several")
    select.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    _add_encoder_mismatch(select)
    select.add_argument("--geojson", type=Path, metavar="FILE", help="kept patches for QuPath")
    select.add_argument("--heatmap", type=Path, metavar="FILE.png", help="all scores by their rank (extra: slides)")
    select.add_argument("--montage", type=Path, metavar="FILE.png", help="the kept patches (extra: slides)")
    select.add_argument("--slide", type=Path, metavar="IMAGE", help="slide image to draw upon (default: none)")
    select.add_argument("--mpp", type=float, help="microns per level-0 pixel, instead of what the file says")
    select.add_argument("--patch-size-level0", type=float, metavar="PX", help="where the file does not say it")
    select.add_argument("--coord-unit", choices=["px", "um"], help="of the coordinates, where the file does not say it")
    select.add_argument(
        "--accept-guess", action="store_true", help="draw upon --slide by a unit or patch size that is only guessed"
    )
    select.add_argument(
        "--geojson-origin",
        default="bounds",
        choices=["bounds", "slide"],
        help="what GeoJSON counts from: the slide's bounds, as QuPath does (default), or openslide's pixel 0, 0",
    )
    select.set_defaults(run=_select)

    demo = commands.add_parser("demo", help="a slide, a real server, an answer and the patches behind it")
    demo.add_argument(
        "--slide",
        type=Path,
        metavar="FILE",
        help="feature file or slide image (default: a photograph of tissue, and 100,000 virtual patches)",
    )
    demo.add_argument("--question", metavar="TEXT")
    demo.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="(default: the trained demo, or random weights for a slide of yours)",
    )
    demo.add_argument("--encoder", default="colour-texture", help="of a slide image (default %(default)s)")
    _add_encoder_mismatch(demo)
    demo.add_argument("--out", type=Path, default=Path("vllm-wsi-demo"), metavar="DIR", help="(default %(default)s)")
    demo.add_argument("--view", action="store_true", help="keep the server and its viewer until Ctrl-C")
    demo.set_defaults(run=_demo)

    init = commands.add_parser("init-checkpoint", help="write a small checkpoint with random weights")
    init.add_argument("out", type=Path, metavar="DIR")
    init.add_argument("--feature-dim", type=int, required=True, metavar="D", help="size of a patch feature")
    init.add_argument("--decoder", default="qwen2", choices=["qwen2", "qwen3", "llama"])
    init.add_argument("--hidden-size", type=int, default=128, help="of the decoder (default 128)")
    init.add_argument("--layers", type=int, default=2, help="of the decoder (default 2)")
    init.add_argument("--max-positions", type=int, default=8192, help="of the decoder (default 8192)")
    init.add_argument("--scorer", default="patch", choices=["patch", "context"], help="(default patch)")
    init.add_argument("--scorer-hidden-size", type=int, default=256, metavar="H", help="0: the plain linear scorer")
    init.add_argument("--num-slide-tokens", type=int, default=32, metavar="K")
    init.add_argument("--position-ids", default="original", choices=["original", "packed"])
    init.add_argument("--seed", type=int, default=0)
    init.add_argument(
        "--text-config",
        type=Path,
        metavar="FILE",
        help="config.json of a decoder of any size, instead of a small one; written without the decoder's weights, for "
        "`vllm serve --load-format dummy`: to measure what that size costs",
    )
    init.set_defaults(run=_init_checkpoint)

    train = commands.add_parser("train", help="train a checkpoint (extra: train)")
    train.add_argument("config", metavar="CONFIG", help="YAML file, or `haystack`: how the demo checkpoint was made")
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="a run that was stopped there goes on")
    _add_encoder_mismatch(train)
    train.add_argument("--seed", type=int, help="instead of the configuration's")
    train.set_defaults(run=_train)

    study = commands.add_parser("study", help="tables and figures: what a selection is worth (extra: study)")
    study.add_argument("--checkpoint", metavar="DIR", help="(default: the demo checkpoint)")
    study.add_argument(
        "--questions", type=Path, metavar="FILE", help="SlideBench .csv (default: haystack's test split)"
    )
    study.add_argument("--features", type=Path, metavar="DIR", help="feature files of the questions' slides")
    study.add_argument(
        "--slides",
        default="1000:192,4000:96,16000:48,100000:24",
        metavar="N:COUNT,...",
        help="of haystack (%(default)s)",
    )
    study.add_argument("--ablations", metavar="CONFIG", help="also train every arm of the last stage of this recipe")
    study.add_argument("--seeds", type=int, default=5, help="of the ablations (default 5)")
    study.add_argument(
        "--ablation-slides", default="1000:192,4000:96,100000:16", metavar="N:COUNT,...", help="(%(default)s)"
    )
    study.add_argument("--seed", type=int, default=0, help="of random selections and resampling")
    _add_encoder_mismatch(study)
    study.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of the model (default cpu)")
    study.add_argument("--out", type=Path, required=True, metavar="DIR")
    study.set_defaults(run=_study)

    evaluate = commands.add_parser("eval", help="a benchmark's questions to any endpoint, scored (extra: eval)")
    evaluate.add_argument("--task", required=True, help="slidebench-tcga, slidebench-bcnb, wsi-vqa, wsi-bench, "
                          "multipathqa, or csv")  # fmt: skip
    evaluate.add_argument("--data", type=Path, required=True, metavar="FILE", help="the benchmark's question file")
    evaluate.add_argument("--features", type=Path, required=True, metavar="DIR", help="feature files of its slides")
    evaluate.add_argument("--out", type=Path, required=True, metavar="DIR", help="a run that was stopped there goes on")
    how = evaluate.add_mutually_exclusive_group()
    how.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible, with /v1; the key is in OPENAI_API_KEY")
    how.add_argument("--offline", metavar="CHECKPOINT", help="vLLM in this process instead")
    how.add_argument("--export-batch", type=Path, metavar="FILE", help="write the requests as an OpenAI batch file")
    how.add_argument("--import-batch", type=Path, metavar="FILE", help="score a batch's output")
    evaluate.add_argument("--model", help="as the server names it (default: its first); needed for batches")
    evaluate.add_argument("--mode", default="generate", choices=["generate", "choice", "both"], help="written answers, "
                          "probabilities of the options' letters, or both (default generate)")  # fmt: skip
    evaluate.add_argument("--baselines", default="blind,constant,random-32,uniform-32", metavar="NAME,...",
                          help="asked beside it, or none (default %(default)s)")  # fmt: skip
    evaluate.add_argument("--skip-slides", type=Path, metavar="FILE", help="slides to leave out, one a line")
    evaluate.add_argument("--limit", type=int, metavar="N", help="the first N questions alone")
    evaluate.add_argument("--columns", default="", metavar="NAME=COLUMN,...", help="of --task csv: slide, question, "
                          "answer, A .. H, key, category")  # fmt: skip
    evaluate.add_argument("--features-url", metavar="URL", help="DIR as the server sees it (default: its file:// URL)")
    evaluate.add_argument("--work", type=Path, metavar="DIR", help="for the slides of 32 patches "
                          "(default: a hidden folder in --features)")  # fmt: skip
    evaluate.add_argument("--compare", type=Path, nargs="+", default=[], metavar="DIR", help="--out of earlier runs")
    evaluate.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at once (default 8)")
    evaluate.add_argument("--retries", type=int, default=5, metavar="N", help="of a request (default 5)")
    evaluate.add_argument("--timeout", type=float, default=600, metavar="S", help="of an attempt (default 600)")
    evaluate.add_argument("--max-tokens", type=int, default=500, metavar="N", help="of an answer (default 500)")
    evaluate.add_argument(
        "--engine-args", type=json.loads, default={}, metavar="JSON", help="of vllm.LLM, for --offline"
    )
    _add_encoder_mismatch(evaluate, "for --offline: ")
    evaluate.add_argument("--seed", type=int, default=0, help="of random-32 and of the intervals")
    evaluate.set_defaults(run=_eval)

    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"vllm-wsi {args.command}: {error}", file=sys.stderr)
        return 1


def _add_encoder_mismatch(command: argparse.ArgumentParser, where: str = "") -> None:
    command.add_argument(
        "--encoder-mismatch",
        default="refuse",
        choices=["refuse", "allow"],
        help=f"{where}features of another encoder than the checkpoint's (default refuse)",
    )


def _doctor(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from vllm_wsi.slides.doctor import Checkpoint, examine
    from vllm_wsi.slides.encoder_names import EncoderCheck

    checkpoint, failed = None, 0
    if args.checkpoint is not None:
        from vllm_wsi.model.config import SparseWSIConfig

        config = SparseWSIConfig.from_pretrained(args.checkpoint)
        encoder = EncoderCheck(config.encoder, args.encoder_mismatch)
        checkpoint = Checkpoint(args.checkpoint, config.feature_dim, encoder)
    for file in args.files:
        report = examine(file, args.encoder, checkpoint)
        print(json.dumps(asdict(report)) if args.json else report.text())
        failed += report.error is not None
    return 1 if failed else 0


def _encode(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from vllm_wsi.encoding.encode_many import Outcome, count_by_status, encode_many, find_jobs, write_summary
    from vllm_wsi.encoding.encode_slide import EncodeSettings

    chosen = ("patch_px", "patch_mpp", "mpp", "tissue", "background", "dtype", "batch_size")
    channels = None if args.channels is None else tuple(args.channels.split(","))
    settings = EncodeSettings(**{name: getattr(args, name) for name in chosen}, channels=channels)
    jobs = find_jobs(args.slides, args.out, args.qc)
    args.out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(jobs), unit="slide", disable=None) as bar:

        def ended(outcome: Outcome) -> None:
            bar.update()
            bar.set_postfix_str("")
            if outcome.status == "failed":
                bar.write(f"failed: {outcome.reason}", file=sys.stderr)
            else:
                patches = f"{outcome.patches:,} patches in {outcome.seconds:.1f} s"
                bar.write(f"{outcome.status}: {outcome.slide}: {outcome.reason or patches}")
            if outcome.warning:
                bar.write(f"warning: {outcome.slide}: {outcome.warning}", file=sys.stderr)

        def progress(done: int, total: int) -> None:
            bar.set_postfix_str(f"{done:,} of {total:,} patches")

        outcomes = encode_many(jobs, args.encoder, settings, args.device, args.workers, ended, progress)
    counts = count_by_status(outcomes)
    print(f"{counts['done']} done, {counts['skipped']} skipped, {counts['failed']} failed; "
          f"see {write_summary(args.out, outcomes)}")  # fmt: skip
    return 1 if counts["failed"] else 0


def _select(args: argparse.Namespace) -> int:
    from vllm_wsi.slides import open_features
    from vllm_wsi.slides.places import Said

    with open_features(args.file, args.encoder) as slide:
        from vllm_wsi.model.checkpoint import load_selector

        selector = load_selector(args.checkpoint, args.device, encoder_mismatch=args.encoder_mismatch)
        selection = selector.select(slide, args.k, keep_all_scores=args.heatmap is not None)
    said = Said(args.mpp, args.patch_size_level0, args.coord_unit, args.accept_guess)
    record = selection.record(str(args.file), said)
    if args.geojson or args.heatmap or args.montage:
        from vllm_wsi.rendering.overlay import SelectionOverlay

        with SelectionOverlay(selection, str(args.file), args.slide, said) as overlay:
            for write, path in (
                (lambda path: overlay.write_geojson(path, args.geojson_origin == "bounds"), args.geojson),
                (overlay.write_heatmap, args.heatmap),
                (overlay.write_montage, args.montage),
            ):
                if path is not None:
                    write(path)
    print(json.dumps({"file": str(args.file), "checkpoint": args.checkpoint, **record}))
    return 0


def _demo(args: argparse.Namespace) -> int:
    _hide_transformers_progress()
    from .demo import run_demo

    return run_demo(
        args.slide, args.question, args.checkpoint, args.encoder, args.out, args.view, args.encoder_mismatch
    )


def _init_checkpoint(args: argparse.Namespace) -> int:
    _hide_transformers_progress()
    from vllm_wsi.model.init_checkpoint import init_checkpoint, init_shape

    options = {
        "scorer_kind": args.scorer,
        "scorer_hidden_size": args.scorer_hidden_size,
        "num_slide_tokens": args.num_slide_tokens,
        "position_ids": args.position_ids,
        "seed": args.seed,
    }
    serve = f"vllm serve {args.out} --plugin vllm_wsi --allowed-local-media-path DIR"
    if args.text_config is not None:
        try:
            text_config = json.loads(args.text_config.read_text())
        except ValueError as error:
            raise ValueError(f"{args.text_config}: found no JSON ({error}), wanted a decoder's config.json") from error
        init_shape(args.out, args.feature_dim, text_config, **options)
        print(f"{args.out}: a shape without the decoder's weights. Serve it with\n  {serve} --load-format dummy")
        return 0
    init_checkpoint(
        args.out,
        args.feature_dim,
        decoder=args.decoder,
        hidden_size=args.hidden_size,
        num_layers=args.layers,
        max_position_embeddings=args.max_positions,
        **options,
    )
    print(f"{args.out}: random weights from seed {args.seed}; its answers mean nothing. Serve it with\n  {serve}")
    return 0


def _train(args: argparse.Namespace) -> int:
    _hide_transformers_progress()
    from vllm_wsi.haystack.recipe import GENERATORS, recipe
    from vllm_wsi.training.settings import load_settings
    from vllm_wsi.training.train import train

    settings = load_settings(recipe(args.config))
    if args.seed is not None:
        settings.seed = args.seed
    if args.encoder_mismatch == "allow":
        settings.encoder_mismatch = "allow"
    checkpoint = train(settings, args.out, GENERATORS)
    print(f"{checkpoint}: serve it with\n  vllm serve {checkpoint} --plugin vllm_wsi --allowed-local-media-path DIR")
    return 0


def _study(args: argparse.Namespace) -> int:
    _hide_transformers_progress()
    from vllm_wsi.study.run_study import run_study

    options = vars(args)
    return run_study(**{name: value for name, value in options.items() if name not in ("run", "command")})


def _eval(args: argparse.Namespace) -> int:
    from vllm_wsi.benchmark.eval_command import run_eval_command

    options = vars(args)
    return run_eval_command(**{name: value for name, value in options.items() if name not in ("run", "command")})


def _hide_transformers_progress() -> None:
    """Its bars are of milliseconds here."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
