//! The same samples, the same numbers: however a step is cut into batches, whatever computes it.

use crate::support::{fixture, largest_difference};
use crate::workspace::{Workspace, samples};

/// The documented bound on relative differences of losses, and on those of adapters relative to the largest element.
const TOLERANCE: f64 = 1e-6;

/// The same figures and the same adapter, within the tolerance.
#[track_caller]
fn assert_agree(workspace: &Workspace, cut: &str, whole: &str) {
    for key in ["labelled_tokens", "tokens", "epoch", "learning_rate"] {
        assert_eq!(workspace.of_steps(cut, key), workspace.of_steps(whole, key), "{key}");
    }
    let losses = workspace.of_steps(whole, "loss");
    for (step, (found, expected)) in workspace.of_steps(cut, "loss").iter().zip(&losses).enumerate() {
        let relative = (found / expected - 1.0).abs();
        assert!(relative <= TOLERANCE, "{cut} step {step}: {found} against {expected}");
    }
    let (adapter, expected) = (workspace.adapter(cut), workspace.adapter(whole));
    for name in expected.names() {
        let ((_, found), (_, expected)) = (adapter.get(&name), expected.get(&name));
        let largest = expected.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
        let (difference, place) = largest_difference(&found, &expected);
        assert!(
            difference <= TOLERANCE * largest,
            "{cut} {name} [{place}]: {} against {}, largest {largest}",
            found[place],
            expected[place]
        );
    }
}

/// Steps of 32 samples in `batch_size` × 32/`batch_size`; 80 samples make two whole steps and one half an epoch.
fn train_cut(workspace: &Workspace, batch_size: usize, shuffle: &str) -> String {
    let output = format!("cut-{batch_size}-{shuffle}");
    let (batch_size, accumulation) = (batch_size.to_string(), (32 / batch_size).to_string());
    let start = fixture("tiny_qwen2/adapter_init_brand");
    workspace
        .train_into(
            &output,
            &[
                "--init-adapter",
                start.to_str().unwrap(),
                "--batch-size",
                &batch_size,
                "--gradient-accumulation-steps",
                &accumulation,
                "--shuffle",
                shuffle,
                "--lora-dropout",
                "0.1",
                "--num-epochs",
                "2",
            ],
        )
        .succeeded();
    output
}

#[test]
fn however_a_step_is_cut_losses_and_adapters_agree() {
    for shuffle in ["false", "true"] {
        let workspace = Workspace::new();
        workspace.write("train.jsonl", samples(3, 80));
        let whole = train_cut(&workspace, 32, shuffle);
        let losses = workspace.of_steps(&whole, "loss");
        assert_eq!(losses.len(), 6);
        for batch_size in [1, 8] {
            let cut = train_cut(&workspace, batch_size, shuffle);
            assert_agree(&workspace, &cut, &whole);
        }
        // The dropout masks did act: without them the losses are others.
        let start = fixture("tiny_qwen2/adapter_init_brand");
        let options = ["--batch-size", "32", "--shuffle", shuffle, "--lora-dropout", "0", "--max-steps", "1"];
        let arguments = [&["--init-adapter", start.to_str().unwrap()], &options[..]].concat();
        workspace.train_into("dry", &arguments).succeeded();
        let relative = (workspace.of_steps("dry", "loss")[0] / losses[0] - 1.0).abs();
        assert!(relative > 1e-5, "{relative}");
    }
}

/// Noise is drawn by sample and position, and B's rate is no batch's: a step of 32 samples that is a whole epoch, so that
/// packing changes the order inside it alone.
#[test]
fn noise_and_a_rate_of_its_own_for_b_do_not_depend_on_the_cut_either() {
    let workspace = Workspace::new();
    workspace.write("train.jsonl", samples(5, 32));
    let start = fixture("tiny_qwen2/adapter_init_brand");
    let train = |output: &str, more: &[&str]| {
        let usual = ["--init-adapter", start.to_str().unwrap(), "--max-steps", "4", "--max-length", "64"];
        // AdamW divides a gradient by its own size, which makes whole steps of the rounding of a small one; with ε = 1 a
        // step is as large as the gradient, and so is its error.
        let noisy = ["--neftune-noise-alpha", "5", "--lora-dropout", "0.1", "--adam-epsilon", "1"];
        workspace.train_into(output, &[&usual[..], &noisy, more].concat()).succeeded();
    };
    const RATIO: [&str; 2] = ["--loraplus-lr-ratio", "16"];
    train("whole", &[&["--batch-size", "32"], &RATIO[..]].concat());
    for (output, packing, batch_size, accumulation) in [
        ("single", "false", "1", "32"),
        ("packed", "true", "32", "1"),
        ("packed-single", "true", "1", "32"),
        ("packed-some", "true", "3", "11"),
    ] {
        let cut = ["--batch-size", batch_size, "--gradient-accumulation-steps", accumulation];
        train(output, &[&["--packing", packing], &cut[..], &RATIO].concat());
        assert_agree(&workspace, output, "whole");
    }
    // The noise and the ratio did act.
    let quiet = ["--init-adapter", start.to_str().unwrap(), "--max-steps", "1", "--lora-dropout", "0.1"];
    workspace.train_into("quiet", &[&quiet[..], &["--batch-size", "32"]].concat()).succeeded();
    train("even", &["--batch-size", "32"]);
    let [noisy, quiet, even] = ["whole", "quiet", "even"].map(|output| workspace.of_steps(output, "loss"));
    assert!((noisy[0] / quiet[0] - 1.0).abs() > 1e-4, "{noisy:?} {quiet:?}");
    assert!(noisy[0] == even[0] && (noisy[3] / even[3] - 1.0).abs() > 1e-4, "{noisy:?} {even:?}");
}

#[test]
fn the_same_seed_gives_the_same_bits_whatever_the_thread_count() {
    let workspace = Workspace::with_data();
    let train = |output: &str, seed: &str, threads: &str| {
        let options = [
            "--seed",
            seed,
            "--threads",
            threads,
            "--num-epochs",
            "2",
            "--lora-target-modules",
            "all-linear",
            "--val-data",
            "val.jsonl",
        ];
        workspace.train_into(output, &options).succeeded();
        let figures: Vec<String> = workspace
            .metrics(output)
            .into_iter()
            .map(|mut object| {
                object.as_object_mut().unwrap().remove("seconds").unwrap();
                object.to_string()
            })
            .collect();
        (figures, workspace.adapter_bytes(output))
    };
    let (figures, adapter) = train("one", "7", "1");
    assert_eq!(figures.len(), 20 + 2);
    for threads in ["1", "2", "3"] {
        let (others, other_adapter) = train(&format!("threads-{threads}"), "7", threads);
        assert_eq!(others, figures, "{threads} threads");
        assert!(other_adapter == adapter, "{threads} threads: the adapter's bits differ");
    }
    let (others, other_adapter) = train("other-seed", "8", "2");
    assert!(other_adapter != adapter);
    assert_ne!(others[0], figures[0]);
}

/// What the backward computes again is what the forward had.
#[test]
fn however_much_is_kept_losses_and_adapters_have_the_same_bits() {
    let workspace = Workspace::with_data();
    let devices: &[&str] = if cfg!(feature = "emulator") { &["cpu", "emulator"] } else { &["cpu"] };
    for device in devices {
        let adapters = ["fast", "balanced", "small"].map(|memory| {
            let output = format!("{device}-{memory}");
            let arguments = ["--device", device, "--activation-memory", memory, "--max-steps", "3"];
            let more = ["--lora-target-modules", "all-linear", "--lora-dropout", "0.1"];
            workspace.train_into(&output, &[&arguments[..], &more].concat()).succeeded();
            workspace.adapter_bytes(&output)
        });
        assert!(adapters[0] == adapters[1] && adapters[1] == adapters[2], "{device}");
    }
}
