//! Rows of whole samples, and batches of samples of like length.

use super::visits::{BATCHES, mix, shuffle};

/// Samples that are packed together: so many that rows fill up, so few that the shuffled order stays one.
const WINDOW: usize = 1024;
/// Batches whose samples are sorted together.
const WINDOW_BATCHES: usize = 64;

/// Puts `items` into rows of at most `capacity` tokens each, and returns where each row ends.
///
/// Within a window of the order: first-fit decreasing (Johnson 1973), then each row's items and the rows themselves as
/// their first items stood. With `keeps_order` a row ends where the next item does not fit.
pub(super) fn pack<T: Copy>(
    items: &mut Vec<T>,
    length: impl Fn(&T) -> usize,
    capacity: usize,
    keeps_order: bool,
) -> Vec<u32> {
    let mut ends = Vec::new();
    if keeps_order {
        let mut used = 0;
        for (place, item) in items.iter().enumerate() {
            let length = length(item);
            if place > 0 && used + length > capacity {
                ends.push(place as u32);
                used = 0;
            }
            used += length;
        }
        ends.push(items.len() as u32);
        return ends;
    }
    let mut packed = Vec::with_capacity(items.len());
    for window in items.chunks(WINDOW) {
        for row in first_fit_decreasing(&window.iter().map(&length).collect::<Vec<_>>(), capacity) {
            packed.extend(row.into_iter().map(|place| window[place]));
            ends.push(packed.len() as u32);
        }
    }
    *items = packed;
    ends
}

/// The places of `lengths` in rows; one that is longer than `capacity` has a row to itself.
fn first_fit_decreasing(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut places: Vec<usize> = (0..lengths.len()).collect();
    places.sort_by_key(|&place| std::cmp::Reverse(lengths[place]));
    let mut rows: Vec<(usize, Vec<usize>)> = Vec::new();
    for place in places {
        let length = lengths[place];
        match rows.iter_mut().find(|(free, _)| *free >= length) {
            Some((free, row)) => {
                *free -= length;
                row.push(place);
            }
            None => rows.push((capacity.saturating_sub(length), vec![place])),
        }
    }
    let mut rows: Vec<Vec<usize>> = rows.into_iter().map(|(_, row)| row).collect();
    rows.iter_mut().for_each(|row| row.sort_unstable());
    rows.sort_unstable_by_key(|row| row[0]);
    rows
}

/// Sorts the items by length within windows of batches, and puts the batches in an order drawn by seed and epoch. A
/// batch that is not full stays the last.
pub(super) fn bucket<T: Copy>(
    items: &mut Vec<T>,
    length: impl Fn(&T) -> usize,
    batch_size: usize,
    (seed, epoch): (u64, u64),
) {
    items
        .chunks_mut(batch_size.saturating_mul(WINDOW_BATCHES))
        .for_each(|window| window.sort_by_key(|item| length(item)));
    let full = items.len() / batch_size * batch_size;
    let mut batches: Vec<&[T]> = items[..full].chunks(batch_size).collect();
    shuffle(&mut batches, mix(seed ^ BATCHES), epoch);
    let order = [&batches.concat()[..], &items[full..]].concat();
    *items = order;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(count: usize, most: u64) -> Vec<(usize, usize)> {
        (0..count as u64).map(|place| (place as usize, 1 + (mix(place + 1) % most) as usize)).collect()
    }

    fn rows(items: &[(usize, usize)], ends: &[u32]) -> Vec<Vec<(usize, usize)>> {
        let starts = [0].into_iter().chain(ends.iter().copied());
        starts.zip(ends).map(|(start, &end)| items[start as usize..end as usize].to_vec()).collect()
    }

    #[test]
    fn every_item_is_in_one_row_and_rows_are_full() {
        for keeps_order in [false, true] {
            let before = lengths(5000, 100);
            let mut items = before.clone();
            let ends = pack(&mut items, |item| item.1, 128, keeps_order);
            let rows = rows(&items, &ends);
            assert_eq!(rows.concat(), items);
            assert!(
                rows.iter().all(|row| !row.is_empty() && row.iter().map(|item| item.1).sum::<usize>() <= 128)
            );
            let tokens: usize = before.iter().map(|item| item.1).sum();
            let share = tokens as f64 / (128 * rows.len()) as f64;
            if keeps_order {
                assert_eq!(items, before);
                // Next-fit leaves no two neighbours that would fit into one.
                let sums: Vec<usize> = rows.iter().map(|row| row.iter().map(|item| item.1).sum()).collect();
                assert!(rows.windows(2).zip(&sums).all(|(pair, sum)| sum + pair[1][0].1 > 128));
            } else {
                // First-fit decreasing needs at most 11/9 of the best (Johnson 1973), and here far less.
                assert!(share > 0.97, "{share}");
                assert_ne!(items, before);
                items.sort_unstable();
                assert_eq!(items, before);
                // The shuffle stays: no item is further from its place than a window.
                let all = rows.concat();
                assert!(all.iter().enumerate().all(|(place, item)| place.abs_diff(item.0) < WINDOW));
            }
        }
    }

    #[test]
    fn small_rows() {
        let pack = |lengths: &[usize], keeps_order| {
            let mut items: Vec<(usize, usize)> = lengths.iter().copied().enumerate().collect();
            let ends = pack(&mut items, |item| item.1, 10, keeps_order);
            let places = |row: &Vec<(usize, usize)>| row.iter().map(|item| item.0).collect::<Vec<_>>();
            rows(&items, &ends).iter().map(places).collect::<Vec<_>>()
        };
        assert_eq!(pack(&[3, 7, 6, 4], false), [vec![0, 1], vec![2, 3]]);
        assert_eq!(pack(&[4, 5, 6, 5], false), [vec![0, 2], vec![1, 3]]);
        assert_eq!(pack(&[4, 5, 6, 5], true), [vec![0, 1], vec![2], vec![3]]);
        assert_eq!(pack(&[10], true), [vec![0]]);
        assert_eq!(pack(&[5, 5], true), [vec![0, 1]]);
    }

    #[test]
    fn batches_hold_like_lengths_in_random_order() {
        let before = lengths(1003, 1000);
        let bucketed = |seed, epoch| {
            let mut items = before.clone();
            bucket(&mut items, |item| item.1, 8, (seed, epoch));
            items
        };
        let items = bucketed(1, 0);
        let mut sorted = items.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, before);
        assert!(items != bucketed(1, 1) && items != bucketed(2, 0) && items == bucketed(1, 0));
        let spread = |items: &[(usize, usize)]| {
            let range = |batch: &[(usize, usize)]| {
                let lengths = || batch.iter().map(|item| item.1);
                lengths().max().unwrap() - lengths().min().unwrap()
            };
            items.chunks(8).map(range).sum::<usize>() as f64 / items.chunks(8).count() as f64
        };
        // 512 sorted lengths from 1 to 1000 in batches of eight: neighbours are about 2 apart.
        assert!(spread(&items) < 30.0 && spread(&before) > 600.0, "{} {}", spread(&items), spread(&before));
        // Short batches are as likely early as late: the means of both halves are alike.
        let mean = |items: &[(usize, usize)]| {
            items.iter().map(|item| item.1).sum::<usize>() as f64 / items.len() as f64
        };
        let (front, back) = (mean(&items[..500]), mean(&items[500..1000]));
        assert!((front - back).abs() < 250.0, "{front} {back}");
        let mut few = before[..5].to_vec();
        bucket(&mut few, |item| item.1, usize::MAX, (1, 0));
        assert_eq!(few.len(), 5);
    }
}
