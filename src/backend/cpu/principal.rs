//! The largest singular values of a matrix with their vectors, by subspace iteration with the products of
//! [`matmul`](super::matmul), which read a weight as it is stored (Halko, Martinsson & Tropp 2011, §4).
//!
//! Legend: `W [O, I]`, `b` vectors at once, which stand as rows.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::matmul::{Linear, LinearBackward, Rows, RowsMut, Weight, linear, linear_backward};

/// Vectors beyond those wanted: they make the wanted ones converge faster.
const OVERSAMPLED: usize = 16;
/// Rounds from one look at the residuals to the next.
const CHECKED: u32 = 5;
/// Most iterations where they go on until nothing changes.
const MOST_ITERATIONS: u32 = 200;

/// `W ≈ Σ σ·uᵀ·v`.
pub struct Principal {
    /// `σ`, the largest first.
    pub values: Vec<f64>,
    /// `u`, each `[O]`.
    pub left: Vec<f32>,
    /// `v`, each `[I]`.
    pub right: Vec<f32>,
}

/// The `count` largest singular values of `weight` with their vectors. With `iterations` so many are done, on `count`
/// vectors; else as many as it takes until the vectors stay within the rounding of f32, on a few more. Runs on the current
/// rayon pool.
pub fn principal(
    weight: Weight<'_>,
    count: usize,
    iterations: Option<u32>,
    seed: u64,
    stream: u64,
) -> Principal {
    let (outputs, inputs) = (weight.rows(), weight.columns());
    let most = outputs.min(inputs);
    let vectors = if iterations.is_some() { count } else { (count + OVERSAMPLED).min(most) };
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    generator.set_stream(stream);
    let mut right: Vec<f32> = (0..vectors * inputs).map(|_| generator.random_range(-1.0..=1.0)).collect();
    let mut left = vec![0.0; vectors * outputs];
    // What rounding leaves of a residual.
    let tolerance = 4.0 * f64::from(f32::EPSILON) * (outputs.max(inputs) as f64).sqrt();
    for round in 0.. {
        // Where they go on until nothing changes, that is looked at now and then: it costs more than a round.
        let only_turns =
            iterations.is_none() && vectors < most && round < MOST_ITERATIONS && round % CHECKED != 0;
        orthonormalise(&mut right, inputs, if only_turns { 1 } else { 2 });
        forward(weight, &right, &mut left);
        if only_turns {
            backward(weight, &left, &mut right);
            continue;
        }
        let values = diagonalise(&mut right, &mut left, vectors);
        let mut back = vec![0.0; right.len()];
        backward(weight, &left, &mut back);
        let is_done = match iterations {
            Some(iterations) => round >= iterations,
            None => {
                let residual = |number: usize| {
                    let rows =
                        back[number * inputs..][..inputs].iter().zip(&right[number * inputs..][..inputs]);
                    rows.map(|(&back, &v)| f64::from(back) - values[number] * f64::from(v))
                        .map(|difference| difference * difference)
                        .sum::<f64>()
                        .sqrt()
                };
                let largest = (0..count).map(residual).fold(0.0, f64::max);
                vectors == most || round >= MOST_ITERATIONS || largest <= tolerance * values[0]
            }
        };
        if is_done {
            left.truncate(count * outputs);
            right.truncate(count * inputs);
            let mut found = Principal { values: values[..count].to_vec(), left, right };
            found.choose_signs();
            return found;
        }
        right = back;
    }
    unreachable!("the rounds end")
}

impl Principal {
    /// Of both signs that a pair may have, the one with which the largest element of `v` is positive.
    fn choose_signs(&mut self) {
        let count = self.values.len();
        let (outputs, inputs) = (self.left.len() / count, self.right.len() / count);
        for (u, v) in self.left.chunks_mut(outputs).zip(self.right.chunks_mut(inputs)) {
            let largest = v.iter().copied().max_by(|one, other| one.abs().total_cmp(&other.abs()));
            if largest.is_some_and(|value| value < 0.0) {
                u.iter_mut().chain(v).for_each(|value| *value = -*value);
            }
        }
    }
}

/// `left [b, O] = right [b, I] · Wᵀ`.
fn forward(weight: Weight<'_>, right: &[f32], left: &mut [f32]) {
    let (outputs, inputs) = (weight.rows(), weight.columns());
    let x = Rows { values: right, stride: inputs };
    linear(Linear::new(right.len() / inputs, x, weight), RowsMut { values: left, stride: outputs });
}

/// `right [b, I] = left [b, O] · W`.
fn backward(weight: Weight<'_>, left: &[f32], right: &mut [f32]) {
    let (outputs, inputs) = (weight.rows(), weight.columns());
    let dy = Rows { values: left, stride: outputs };
    linear_backward(
        LinearBackward::new(left.len() / outputs, dy, weight),
        RowsMut { values: right, stride: inputs },
    );
}

fn dot(one: &[f32], other: &[f32]) -> f64 {
    one.iter().zip(other).map(|(&one, &other)| f64::from(one) * f64::from(other)).sum()
}

/// Gram-Schmidt over the rows of `width`; the second `pass` takes away what rounding leaves the first time. A row that depends
/// on those before becomes zero.
fn orthonormalise(rows: &mut [f32], width: usize, passes: usize) {
    for _ in 0..passes {
        for number in 0..rows.len() / width {
            let (before, rest) = rows.split_at_mut(number * width);
            let row = &mut rest[..width];
            let length = dot(row, row).sqrt();
            for earlier in before.chunks(width) {
                let along = dot(earlier, row) as f32;
                row.iter_mut().zip(earlier).for_each(|(value, earlier)| *value -= along * earlier);
            }
            let left = dot(row, row).sqrt();
            let factor = if left > 1e-6 * length { 1.0 / left } else { 0.0 };
            row.iter_mut().for_each(|value| *value = (factor * f64::from(*value)) as f32);
        }
    }
}

/// Turns `left = right · Wᵀ` and `right` so that the rows of `left` are orthogonal, the longest first, and of length 1; returns
/// the lengths they had.
fn diagonalise(right: &mut [f32], left: &mut [f32], count: usize) -> Vec<f64> {
    let (inputs, outputs) = (right.len() / count, left.len() / count);
    let mut gram = vec![0.0; count * count];
    for i in 0..count {
        for j in 0..=i {
            let product = dot(&left[i * outputs..][..outputs], &left[j * outputs..][..outputs]);
            (gram[i * count + j], gram[j * count + i]) = (product, product);
        }
    }
    let vectors = eigenvectors(&mut gram, count);
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by(|&one, &other| gram[other * count + other].total_cmp(&gram[one * count + one]));
    turn(right, inputs, &vectors, &order);
    turn(left, outputs, &vectors, &order);
    left.chunks_mut(outputs)
        .map(|row| {
            let length = dot(row, row).sqrt();
            let factor = if length > 0.0 { 1.0 / length } else { 0.0 };
            row.iter_mut().for_each(|value| *value = (factor * f64::from(*value)) as f32);
            length
        })
        .collect()
}

/// Replaces the rows by their combinations: the new row `n` is `Σ_i vectors[i][order[n]] · row i`.
fn turn(rows: &mut [f32], width: usize, vectors: &[f64], order: &[usize]) {
    let count = order.len();
    let mut turned = vec![0.0f64; width];
    let before = rows.to_vec();
    for (row, &column) in rows.chunks_mut(width).zip(order) {
        turned.fill(0.0);
        for (i, old) in before.chunks(width).enumerate() {
            let factor = vectors[i * count + column];
            turned.iter_mut().zip(old).for_each(|(turned, &old)| *turned += factor * f64::from(old));
        }
        row.iter_mut().zip(&turned).for_each(|(value, turned)| *value = *turned as f32);
    }
}

/// Leaves the eigenvalues of a symmetric `[n, n]` matrix on its diagonal and returns the eigenvectors as columns (Jacobi's
/// rotations, Golub & Van Loan 2013, §8.5).
fn eigenvectors(matrix: &mut [f64], n: usize) -> Vec<f64> {
    const SWEEPS: usize = 60;
    let mut vectors = vec![0.0; n * n];
    (0..n).for_each(|i| vectors[i * n + i] = 1.0);
    let size: f64 = matrix.iter().map(|value| value * value).sum::<f64>().sqrt();
    for _ in 0..SWEEPS {
        let mut rotated = false;
        for p in 0..n {
            for q in p + 1..n {
                let off = matrix[p * n + q];
                if off.abs() <= f64::EPSILON * size / n as f64 {
                    continue;
                }
                rotated = true;
                let theta = (matrix[q * n + q] - matrix[p * n + p]) / (2.0 * off);
                let tangent = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let cosine = 1.0 / (tangent * tangent + 1.0).sqrt();
                let sine = tangent * cosine;
                let rotate = |one: &mut f64, other: &mut f64| {
                    (*one, *other) = (cosine * *one - sine * *other, sine * *one + cosine * *other);
                };
                for k in 0..n {
                    let (mut one, mut other) = (matrix[k * n + p], matrix[k * n + q]);
                    rotate(&mut one, &mut other);
                    (matrix[k * n + p], matrix[k * n + q]) = (one, other);
                    let (mut one, mut other) = (vectors[k * n + p], vectors[k * n + q]);
                    rotate(&mut one, &mut other);
                    (vectors[k * n + p], vectors[k * n + q]) = (one, other);
                }
                for k in 0..n {
                    let (mut one, mut other) = (matrix[p * n + k], matrix[q * n + k]);
                    rotate(&mut one, &mut other);
                    (matrix[p * n + k], matrix[q * n + k]) = (one, other);
                }
            }
        }
        if !rotated {
            break;
        }
    }
    vectors
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(count: usize, seed: u64) -> Vec<f64> {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        (0..count).map(|_| generator.random_range(-1.0..=1.0)).collect()
    }

    /// `[O, I]` with known singular values: `U·diag(σ)·Vᵀ`, the vectors from orthonormalised noise.
    fn known(outputs: usize, inputs: usize, values: &[f64]) -> Vec<f32> {
        let narrow = |values: Vec<f64>| values.into_iter().map(|value| value as f32).collect::<Vec<_>>();
        let (mut u, mut v) =
            (narrow(noise(values.len() * outputs, 1)), narrow(noise(values.len() * inputs, 2)));
        orthonormalise(&mut u, outputs, 2);
        orthonormalise(&mut v, inputs, 2);
        let mut weight = vec![0.0f64; outputs * inputs];
        for ((u, v), value) in u.chunks(outputs).zip(v.chunks(inputs)).zip(values) {
            for (row, u) in weight.chunks_mut(inputs).zip(u) {
                row.iter_mut().zip(v).for_each(|(w, v)| *w += value * f64::from(*u) * f64::from(*v));
            }
        }
        narrow(weight)
    }

    #[test]
    fn the_largest_singular_values_and_their_vectors_are_found() {
        let values: Vec<f64> = (0..40).map(|number| 3.0 * 0.9f64.powi(number)).collect();
        for (outputs, inputs) in [(70, 50), (40, 90)] {
            let weight = known(outputs, inputs, &values);
            let matrix = Weight::f32(inputs, &weight);
            let found = principal(matrix, 5, None, 7, 0);
            for (number, (value, expected)) in found.values.iter().zip(&values).enumerate() {
                assert!((value / expected - 1.0).abs() < 1e-5, "{number}: {value} {expected}");
                let (u, v) =
                    (&found.left[number * outputs..][..outputs], &found.right[number * inputs..][..inputs]);
                assert!((dot(u, u) - 1.0).abs() < 1e-5 && (dot(v, v) - 1.0).abs() < 1e-5);
                // W·v = σ·u, element by element, within the rounding of f32.
                for (row, u) in weight.chunks(inputs).zip(u) {
                    assert!((dot(row, v) - value * f64::from(*u)).abs() < 1e-5 * values[0], "{number}");
                }
            }
            // Iterations asked for come close, and are the same each time.
            let asked = principal(matrix, 5, Some(16), 7, 0);
            assert!((asked.values[0] / values[0] - 1.0).abs() < 1e-3);
            assert_eq!(asked.right, principal(matrix, 5, Some(16), 7, 0).right);
            assert_ne!(asked.right, principal(matrix, 5, Some(16), 7, 1).right, "a stream of its own");
        }
    }

    #[test]
    fn matrices_of_low_rank_and_of_zeros_leave_nothing_undefined() {
        for weight in [known(12, 9, &[2.0, 1.0]), vec![0.0; 108]] {
            let found = principal(Weight::f32(9, &weight), 4, None, 1, 0);
            assert!(found.values.iter().chain(&[0.0]).all(|value| value.is_finite()));
            assert!(found.left.iter().chain(&found.right).all(|value| value.is_finite()));
            assert!(found.values[3] < 1e-6);
        }
    }
}
