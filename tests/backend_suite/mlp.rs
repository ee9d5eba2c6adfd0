//! The gated MLP: adapters on any of its linears, dropout, the activation kept or not, and how far gradients go.

use fastlora::backend::{
    Activation, Backend, Dropout, LinearGroup, LinearInput, LoraSlot, Mlp, MlpGradient, MlpSaved,
    NormedInput, PassSettings, PlacedAdapter, Projection, Reach,
};
use fastlora::batch::Batch;
use fastlora::dtype::DType;

use super::reference::{self, dot, dropout_factors};
use super::{
    Record, batch_of, buffer, finite_differences, norm_of, norm_weight, read, read_floats, resident_with,
    stored, values, widen,
};

/// What is in front of the MLP's own numbers in the flat buffer, and behind them.
const MARGIN: usize = 8;

#[derive(Clone, Copy, Debug)]
struct Case {
    /// Of gate, up and down; 0: no adapter.
    ranks: [usize; 3],
    activation: Activation,
    dropout: Option<Dropout>,
    has_residual: bool,
}

/// One of the two groups, on the backend and in float64.
struct Linear<B: Backend> {
    group: LinearGroup<B>,
    weight: Vec<f64>,
}

impl<B: Backend> Linear<B> {
    /// `projections` of an output width and a rank each; `end` of the flat buffer moves behind their adapters.
    fn new(
        backend: &B,
        record: &Record,
        input_index: u32,
        in_features: usize,
        projections: &[(usize, usize)],
        end: &mut usize,
    ) -> Self {
        let (precision, outputs) = (record.precision, projections.iter().map(|&(out, _)| out).sum::<usize>());
        let numbers = values(outputs * in_features, 50 + u64::from(input_index));
        let (tensor, weight) = stored(precision, "w", DType::F16, vec![outputs, in_features], &numbers, 0);
        let mut a_offset = *end;
        let ranks: usize = projections.iter().map(|&(_, rank)| rank).sum();
        let mut b_offset = a_offset + ranks * in_features;
        let mut place = |&(out_features, rank): &(usize, usize)| {
            let slot =
                LoraSlot { rank, scale: 0.5 + rank as f32, a_offset, b_offset, magnitude_offset: None };
            a_offset += rank * in_features;
            b_offset += rank * out_features;
            Projection { out_features, lora: (rank > 0).then_some(slot) }
        };
        let projections = projections.iter().map(&mut place).collect();
        *end = b_offset.next_multiple_of(precision.width_multiple);
        let matrix = backend.matrix(&[tensor]).unwrap();
        let group = LinearGroup::new(backend, input_index, matrix, None, in_features, projections).unwrap();
        Self { group, weight }
    }

    /// The output of one row, the adapters reading what dropout leaves of it.
    fn row(&self, x: &[f64], factors: &[f64], adapters: &[f64]) -> Vec<f64> {
        let places: Vec<PlacedAdapter> = self.group.adapters().collect();
        let linear = reference::Linear {
            weight: &self.weight,
            in_features: self.group.in_features,
            bias: None,
            adapters: &places,
            parameters: adapters,
        };
        let dropped: Vec<f64> = x.iter().zip(factors).map(|(x, factor)| x * factor).collect();
        linear.y_row(x, &linear.s_row(&dropped))
    }

    /// Factors of the mask on its input, row by row.
    fn factors(&self, batch: &Batch, dropout: Option<Dropout>) -> Vec<Vec<f64>> {
        let of_row =
            |row| dropout_factors(batch, dropout, self.group.input_index, row, self.group.in_features);
        (0..batch.token_count()).map(of_row).collect()
    }
}

/// What a forward leaves.
struct Left<B: Backend> {
    normed: B::Buffer,
    gate_up: B::Buffer,
    gate_up_s: B::Buffer,
    act: B::Buffer,
    down_s: B::Buffer,
}

impl<B: Backend> Left<B> {
    fn split(&mut self) -> (&mut B::Buffer, MlpSaved<'_, B>) {
        let Self { normed, gate_up, gate_up_s, act, down_s } = self;
        (normed, MlpSaved { gate_up, gate_up_s, act, down_s })
    }
}

pub fn run<B: Backend>(backend: &B, record: &mut Record) {
    for present in 0..8_usize {
        let ranks = [(3, 1), (5, 2), (2, 4)].map(|(rank, bit)| if present & bit > 0 { rank } else { 0 });
        let dropout = Dropout { probability: 0.3, seed: 77, epoch: 1 };
        for dropout in [None, Some(dropout)].into_iter().take(if present > 0 { 2 } else { 1 }) {
            let activation = if present % 2 == 0 { Activation::Silu } else { Activation::GeluTanh };
            check(backend, record, Case { ranks, activation, dropout, has_residual: present % 3 == 0 });
        }
    }
    // More ranks than CUDA's fused kernels hold.
    let (activation, dropout) = (Activation::Silu, None);
    check(backend, record, Case { ranks: [2, 70, 3], activation, dropout, has_residual: true });
}

fn check<B: Backend>(backend: &B, record: &mut Record, case: Case) {
    let precision = record.precision;
    let (hidden, width) = (precision.width(9), precision.width(17));
    let [gate, up, down] = case.ranks;
    let mut end = MARGIN;
    let gate_up = Linear::new(backend, record, 6, hidden, &[(width, gate), (width, up)], &mut end);
    let down = Linear::new(backend, record, 7, width, &[(hidden, down)], &mut end);
    let mlp = Mlp { gate_up: &gate_up.group, down: &down.group, activation: case.activation };

    let host_batch = batch_of(&[4, 1, 6], 9);
    let rows = host_batch.token_count();
    let settings = PassSettings { dropout: case.dropout, ..PassSettings::default() };
    let batch = resident_with(backend, &host_batch, settings);
    let parameters = values(end + MARGIN, 61);
    let adapters = backend.floats(&parameters).unwrap();
    for group in [mlp.gate_up, mlp.down] {
        backend.renew_group(group, &adapters).unwrap();
    }
    let [stream, residual, dy] = [62, 63, 64].map(|seed| precision.values(rows * hidden, seed));
    let (stream_buffer, dy_buffer) = (buffer(backend, &stream), buffer(backend, &dy));
    let norm_weight = norm_weight(backend, precision, hidden);
    let norm = norm_of(&norm_weight, hidden);
    let residual_buffer = case.has_residual.then(|| buffer(backend, &residual));
    let stride = |group: &LinearGroup<B>| backend.low_rank_stride(group.total_rank()).max(1);
    let buffer_of = |width: usize| backend.buffer(rows * width).unwrap();
    let mut left = Left::<B> {
        normed: buffer_of(hidden),
        gate_up: buffer_of(2 * width),
        gate_up_s: buffer_of(stride(mlp.gate_up)),
        act: buffer_of(width),
        down_s: buffer_of(stride(mlp.down)),
    };
    let mut y = buffer_of(hidden);
    let forward = |left: &mut Left<B>, y: &mut B::Buffer| {
        let (normed, saved) = left.split();
        let input = NormedInput { norm, x: &stream_buffer, rows, batch: &batch, normed };
        backend.mlp(mlp, &adapters, input, residual_buffer.as_ref(), saved, y).unwrap();
    };
    forward(&mut left, &mut y);
    let x = read(backend, &left.normed, rows * hidden);
    let mut separate = buffer_of(hidden);
    backend.rms_norm(norm, rows, &stream_buffer, None, &mut separate).unwrap();
    assert_eq!(x, read(backend, &separate, rows * hidden), "mlp {case:?}: normed");

    let factors = [gate_up.factors(&host_batch, case.dropout), down.factors(&host_batch, case.dropout)];
    let exact = |x: &[f64], adapters: &[f64]| -> Vec<f64> {
        let of_row = |(row, x): (usize, &[f64])| {
            let pair = gate_up.row(x, &factors[0][row], adapters);
            down.row(&reference::gated(case.activation, &pair, width), &factors[1][row], adapters)
        };
        x.chunks(hidden).enumerate().flat_map(of_row).collect()
    };
    let (wide_x, wide_parameters, wide_dy) = (widen(&x), widen(&parameters), widen(&dy));
    let mut expected = exact(&wide_x, &wide_parameters);
    if case.has_residual {
        expected.iter_mut().zip(&residual).for_each(|(y, &residual)| *y += f64::from(residual));
    }
    let terms = hidden + 2 * width + case.ranks.iter().sum::<usize>();
    record.check(&format!("mlp {case:?} y"), &read(backend, &y, rows * hidden), &expected, terms);

    let loss = |x: &[f64], adapters: &[f64]| dot(&exact(x, adapters), &wide_dy);
    let expected_dx = finite_differences(&wide_x, |x| loss(x, &wide_parameters));
    let before = values(parameters.len(), 65);
    let mut expected = finite_differences(&wide_parameters, |adapters| loss(&wide_x, adapters));
    expected.iter_mut().zip(&before).for_each(|(sum, &before)| *sum += f64::from(before));

    let (mut dact, mut dx) = (buffer_of(width), buffer_of(hidden));
    let mut whole: Option<Vec<f32>> = None;
    for (act_is_kept, goes_to) in [(true, "input"), (false, "input"), (false, "gate|up"), (true, "down")] {
        forward(&mut left, &mut y);
        if !act_is_kept {
            backend.write_buffer(&mut left.act, &vec![f32::NAN; rows * width]).unwrap();
        }
        backend.write_buffer(&mut dx, &vec![f32::NAN; rows * hidden]).unwrap();
        let reach = match goes_to {
            "input" => Reach::Input(&mut dx),
            "gate|up" => Reach::First,
            _ => Reach::Second,
        };
        let gradient = MlpGradient { dy: &dy_buffer, act_is_kept, dact: &mut dact, reach };
        let mut gradients = backend.floats(&before).unwrap();
        let (normed, saved) = left.split();
        let input = LinearInput { x: normed, rows, batch: &batch };
        backend.mlp_backward(mlp, &adapters, input, saved, gradient, &mut gradients).unwrap();
        let found = read_floats(backend, &gradients, before.len());
        let case = format!("mlp {case:?} to {goes_to}, act kept: {act_is_kept}");
        if goes_to == "input" {
            record.check(&format!("{case}, dx"), &read(backend, &dx, rows * hidden), &expected_dx, terms);
        }
        let Some(whole) = &whole else {
            record.check(&format!("{case}, gradients"), &found, &expected, rows + terms);
            whole = Some(found);
            continue;
        };
        // Less of the same: no bit differs, but what is not reached.
        let reaches = |place: usize| match goes_to {
            "down" => mlp.down.adapters().any(|adapter| {
                let LoraSlot { rank, a_offset, b_offset, .. } = adapter.slot;
                (a_offset..a_offset + rank * width).contains(&place)
                    || (b_offset..b_offset + rank * adapter.out_features).contains(&place)
            }),
            _ => true,
        };
        for (place, &found) in found.iter().enumerate() {
            let expected = if reaches(place) { whole[place] } else { before[place] };
            assert_eq!(found, expected, "{case}: gradient {place}");
        }
    }
}
