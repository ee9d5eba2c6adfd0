//! `evaluate --swap-hash`: how much the conditioning steers, by the loss under every other hash.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};

use crate::backend::Backend;
use crate::data::{Dataset, Origin, Record};
use crate::error::{Error, Result, escape_control};
use crate::evaluation::{Evaluation, Figures};
use crate::model::Transformer;
use crate::tokens::{BatchOptions, Sample, SampleOptions, SampleSet, Tokenizer, tokenise};
use crate::training::{Split, evaluate};

/// The samples of a data set under each hash that is not their own.
pub(super) struct Swaps {
    /// The hash that stands in the text, and the samples, whose figures go to their own hash.
    sets: Vec<(String, SampleSet)>,
}

/// Figures under the right hash and under the others.
pub(super) struct Swapped {
    rows: BTreeMap<String, Row>,
}

#[derive(Default)]
struct Row {
    right: Figures,
    /// By the hash that stood in the text.
    others: BTreeMap<String, Figures>,
}

impl Swaps {
    /// # Errors
    /// Fewer than two hashes, records whose text holds none, and what tokenising refuses.
    pub(super) fn new(
        dataset: &Dataset,
        tokenizer: Option<&Tokenizer>,
        options: &SampleOptions,
    ) -> Result<Self> {
        if let Some(record) = dataset.records.iter().find(|record| record.text_hash().is_none()) {
            return Err(Error::data("no hash stands in the text of this record, so none can be swapped")
                .at(record.origin.to_string())
                .hint("give records with text and a hash"));
        }
        let hashes: BTreeSet<&str> = dataset.records.iter().map(|record| record.hash.as_str()).collect();
        if hashes.len() < 2 {
            return Err(Error::data("all records have one hash: there is no other to swap it with"));
        }
        let own: HashMap<&Origin, &str> =
            dataset.records.iter().map(|record| (&record.origin, record.hash.as_str())).collect();
        let swap = |hash: &&str| {
            let others = dataset.records.iter().filter(|record| record.hash != **hash);
            let records = others.map(|record| Record { hash: hash.to_string(), ..record.clone() }).collect();
            let swapped = Dataset { records, ..Dataset::default() };
            let set = tokenise(&swapped, tokenizer, options)?;
            let under_own_hash = set.iter().map(|sample| {
                let own = own[&sample.origin()];
                let hash = hashes.iter().position(|hash| *hash == own).unwrap_or(0);
                Sample { hash, ..sample.to_sample() }
            });
            let names = hashes.iter().map(|hash| hash.to_string()).collect();
            Ok((hash.to_string(), SampleSet::new(under_own_hash, names)))
        };
        Ok(Self { sets: hashes.iter().map(swap).collect::<Result<_>>()? })
    }

    /// Measures the loss under every other hash; `right` are the figures under the right one.
    pub(super) fn measure<B: Backend>(
        &self,
        model: &mut Transformer<B>,
        backend: &Arc<B>,
        batches: BatchOptions,
        right: &Evaluation,
    ) -> Result<Swapped> {
        let mut rows: BTreeMap<String, Row> = BTreeMap::new();
        for (hash, figures) in right.by_hash() {
            rows.entry(hash.clone()).or_default().right = *figures;
        }
        for (other, set) in &self.sets {
            let split = Split::new(set, batches)?;
            let evaluation = backend.run(|| evaluate(&mut *model, &split))?;
            for (own, figures) in evaluation.by_hash() {
                rows.entry(own.clone()).or_default().others.insert(other.clone(), *figures);
            }
        }
        Ok(Swapped { rows })
    }
}

impl Row {
    /// Mean loss of a labelled token under the other hashes.
    fn swapped_loss(&self) -> Option<f64> {
        let sum = self.others.values().fold((0.0, 0), |(loss, tokens), figures| {
            (loss + figures.loss_sum, tokens + figures.labelled_tokens)
        });
        (sum.1 > 0).then(|| sum.0 / sum.1 as f64)
    }

    /// The hash under which the loss is lowest, if that is not the right one.
    fn better(&self) -> Option<&str> {
        let right = self.right.loss()?;
        let lowest = self.others.iter().filter_map(|(hash, figures)| Some((hash, figures.loss()?)));
        let (hash, loss) = lowest.min_by(|one, other| one.1.total_cmp(&other.1))?;
        (loss < right).then_some(hash.as_str())
    }

    fn to_json(&self) -> Value {
        let others: serde_json::Map<_, _> =
            self.others.iter().map(|(hash, figures)| (hash.clone(), json!(figures.loss()))).collect();
        json!({
            "loss": self.right.loss(),
            "swapped_loss": self.swapped_loss(),
            "loss_under": others,
            "lower_under": self.better(),
        })
    }
}

impl Swapped {
    fn overall(&self) -> Row {
        let mut all = Row::default();
        let add = |sum: &mut Figures, figures: &Figures| {
            sum.samples += figures.samples;
            sum.labelled_tokens += figures.labelled_tokens;
            sum.correct_tokens += figures.correct_tokens;
            sum.loss_sum += figures.loss_sum;
        };
        for row in self.rows.values() {
            add(&mut all.right, &row.right);
            for (hash, figures) in &row.others {
                add(all.others.entry(hash.clone()).or_default(), figures);
            }
        }
        all
    }

    pub(super) fn to_json(&self) -> Value {
        let overall = self.overall();
        json!({
            "overall": { "loss": overall.right.loss(), "swapped_loss": overall.swapped_loss() },
            "by_hash": self.rows.iter().map(|(hash, row)| (hash.clone(), row.to_json())).collect::<serde_json::Map<_, _>>(),
        })
    }

    pub(super) fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_preset(presets::UTF8_FULL_CONDENSED);
        table.set_header(["hash", "loss", "under other hashes", "difference", "lower under"]);
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let number = |value: Option<f64>| value.map_or("–".to_string(), |value| format!("{value:.4}"));
        let overall = self.overall();
        let rows = self.rows.iter().map(|(hash, row)| (escape_control(hash), row, row.better()));
        for (name, row, better) in rows.chain([("all".to_string(), &overall, None)]) {
            let difference = row.swapped_loss().zip(row.right.loss()).map(|(swapped, right)| swapped - right);
            table.add_row([
                name,
                number(row.right.loss()),
                number(row.swapped_loss()),
                difference.map_or("–".to_string(), |difference| format!("{difference:+.4}")),
                better.map_or("–".to_string(), escape_control),
            ]);
        }
        table
    }
}
