//! The CPU backend through the suite that every backend passes, at each level of instructions, on 1, 2 and 3 threads.

mod backend_suite;

use backend_suite::{
    Precision, batch_cuts_agree, batch_of, buffer, read, read_floats, resident_with, run, values,
};
use fastlora::backend::cpu::CpuBackend;
use fastlora::backend::cpu::simd::Simd;
use fastlora::backend::{Backend, Head, PassSettings, Weight};
use fastlora::tensor::WeightTensor;

#[test]
fn every_operation_matches_float64_at_every_level_with_equal_bits_on_any_threads() {
    for simd in Simd::available() {
        let [one, two, three] = [1, 2, 3]
            .map(|threads| run(&CpuBackend::with_simd(Some(threads), simd).unwrap(), Precision::F32).outputs);
        for (other, threads) in [(&two, 2), (&three, 3)] {
            assert_eq!(one.len(), other.len());
            for ((case, a), (_, b)) in one.iter().zip(other) {
                let same = a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{simd}, {case}: one thread and {threads} differ");
            }
        }
    }
}

#[test]
fn figures_do_not_depend_on_how_a_batch_is_cut() {
    for simd in Simd::available() {
        batch_cuts_agree(&CpuBackend::with_simd(Some(2), simd).unwrap());
    }
}

/// Logits of 200 rows over 50 000 tokens take two chunks.
#[test]
fn chunks_of_logits_leave_no_seam() {
    let backend = CpuBackend::new(Some(2)).unwrap();
    let (vocabulary, width) = (50_000, 4);
    let table = WeightTensor::from_f32("head", vec![vocabulary, width], &values(vocabulary * width, 1));
    let weight = backend.matrix(&[table]).unwrap();
    let run = |lengths: &[usize], x: &[f32]| {
        let batch = batch_of(lengths, vocabulary as u32);
        let count = batch.labelled_count();
        assert_eq!(count * width, x.len());
        let mut losses = backend.floats(&vec![0.0; 2 * count]).unwrap();
        let mut dx = backend.buffer(x.len()).unwrap();
        let head = Head { weight: Weight::Frozen(&weight), vocabulary, width, soft_cap: None };
        let settings = PassSettings { gradient_scale: 0.5, ..PassSettings::default() };
        let batch = resident_with(&backend, &batch, settings);
        backend.head_loss(head, &batch, &buffer(&backend, x), &mut losses, Some(&mut dx), None).unwrap();
        let losses = read_floats(&backend, &losses, count);
        losses
            .into_iter()
            .zip(read(&backend, &dx, x.len()).chunks(width).map(<[f32]>::to_vec))
            .collect::<Vec<_>>()
    };
    let lengths = [301];
    let x = values(batch_of(&lengths, 9).labelled_count() * width, 2);
    let whole = run(&lengths, &x);
    assert!(whole.len() * vocabulary > 8 * 1024 * 1024, "two chunks");
    // The first sample of the pair has the same tokens and targets as the beginning of the long one.
    let short = [151];
    let count = batch_of(&short, 9).labelled_count();
    assert_eq!(run(&short, &x[..count * width])[..], whole[..count]);
    let longest = whole.iter().map(|(loss, _)| *loss).fold(0.0, f32::max);
    assert!(whole.iter().all(|(loss, _)| loss.is_finite()) && longest > 5.0);
}

#[test]
fn zero_threads_are_refused_and_the_description_names_threads_and_instructions() {
    assert!(CpuBackend::new(Some(0)).is_err());
    let description = CpuBackend::with_simd(Some(3), Simd::available()[0]).unwrap().description();
    assert_eq!(description, "cpu, 3 threads, portable");
}
