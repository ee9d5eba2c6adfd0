use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use super::handshake::{Hello, hear_answer};
use super::*;
use crate::error::ErrorKind;

/// Longer than any test takes.
const LONG: Duration = Duration::from_secs(120);
/// What a test waits for on purpose, with and without the time to meet before.
const TO_MEET: Duration = Duration::from_secs(4);
const SHORT: Duration = Duration::from_millis(300);

fn host(world_size: usize) -> Host {
    Host::bind((Ipv4Addr::LOCALHOST, 0), world_size).unwrap()
}

/// What `work` gives on each of `world_size` processes, which are threads.
fn on_each<T: Send>(world_size: usize, patience: Duration, work: impl Fn(Group) -> T + Sync) -> Vec<T> {
    let host = host(world_size);
    let address = host.address().to_string();
    thread::scope(|scope| {
        let (work, address) = (&work, &address);
        let others: Vec<_> = (1..world_size)
            .map(|rank| {
                scope.spawn(move || work(join(address, rank, world_size, patience, || Ok(())).unwrap()))
            })
            .collect();
        let first = work(host.accept(patience, || Ok(())).unwrap());
        [first].into_iter().chain(others.into_iter().map(|other| other.join().unwrap())).collect()
    })
}

/// Values of both signs and many sizes, others on each rank.
fn values(rank: usize, count: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_u32.wrapping_mul(rank as u32 + 1);
    let mut draw = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32
    };
    (0..count).map(|_| (draw() - 0.5) * (20.0 * draw() - 10.0).exp2()).collect()
}

#[test]
fn sums_are_those_of_float64_with_the_same_bits_everywhere_and_always() {
    for world_size in 1..=5 {
        for count in [0, 1, 3, 4, 5, 17, 1000] {
            let sum = || {
                on_each(world_size, LONG, |mut group| {
                    let mut values = values(group.rank(), count);
                    group.sum(&mut values).unwrap();
                    values
                })
            };
            let sums = sum();
            for (place, &found) in sums[0].iter().enumerate() {
                let terms = (0..world_size).map(|rank| f64::from(values(rank, count)[place]));
                let (expected, sizes) =
                    terms.fold((0.0, 0.0), |(sum, sizes), term| (sum + term, sizes + term.abs()));
                // Each of the additions rounds a number that is no larger than the sum of the sizes, by half a unit.
                let bound = 0.5 * f64::from(f32::EPSILON) * (world_size as f64) * sizes;
                let found = f64::from(found);
                assert!((found - expected).abs() <= bound, "{world_size} [{place}]: {found}, {expected}");
            }
            let bits = |sums: &[Vec<f32>]| -> Vec<Vec<u32>> {
                sums.iter().map(|sum| sum.iter().map(|value| value.to_bits()).collect()).collect()
            };
            let first = bits(&sums);
            assert!(first.iter().all(|rank| *rank == first[0]), "{world_size} processes, {count} values");
            assert_eq!(bits(&sum()), first);
        }
    }
}

#[test]
fn stretches_cover_all_values_once() {
    for (count, parts) in [(0, 3), (2, 5), (10, 3), (9, 3)] {
        let places: Vec<usize> = (0..parts).flat_map(|part| stretch(count, part, parts)).collect();
        assert_eq!(places, (0..count).collect::<Vec<_>>());
    }
}

/// Far more than the buffers of the sockets hold.
#[test]
fn long_messages_do_not_wait_for_each_other() {
    let count = 6 << 20;
    for sum in on_each(3, LONG, |mut group| {
        let mut values = vec![1.0 + group.rank() as f32; count];
        group.sum(&mut values).unwrap();
        values
    }) {
        assert!(sum.len() == count && sum.iter().all(|value| *value == 6.0));
    }
}

#[test]
fn everyone_gets_what_each_gave_and_what_the_first_has() {
    for world_size in 1..=4 {
        let part = |rank: usize| vec![rank as u8; 1000 * rank];
        for (gathered, values) in on_each(world_size, LONG, |mut group| {
            let mut values = [group.rank() as f32 + 0.5, f32::NAN];
            group.broadcast(&mut values).unwrap();
            (group.gather(&part(group.rank())).unwrap(), values)
        }) {
            assert_eq!(gathered, (0..world_size).map(part).collect::<Vec<_>>());
            assert_eq!(values[0], 0.5);
            assert!(values[1].is_nan());
        }
    }
}

#[test]
fn fault_64_strangers_are_dropped_and_the_members_still_meet() {
    let host = host(2);
    let address = host.address();
    let hello = |world_size, rank| Hello { world_size, rank, port: 1 };
    let connect = || TcpStream::connect(address).unwrap();
    let group = thread::scope(|scope| {
        let group = scope.spawn(|| host.accept(LONG, || Ok(())).unwrap());
        // One that says nothing and leaves, one of another trade, one that stops in the middle.
        drop(connect());
        for said in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 4096], b"fastlora", b"fast"] {
            let mut stream = connect();
            stream.write_all(said).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            // Dropped without a word; with what was said unread, or not.
            assert!(!matches!(stream.read(&mut [0]), Ok(1)), "{said:?}");
        }
        // Would-be members are told why they are none.
        let refusal = |hello: Hello| {
            let stream = connect();
            hello.send(&stream).unwrap();
            hear_answer(&stream).unwrap().unwrap_err()
        };
        assert!(refusal(hello(3, 1)).contains("rank 1 of 3 processes, here are 2"));
        assert!(refusal(hello(2, 2)).contains("rank 2 of 2"));
        assert!(refusal(hello(2, 0)).contains("there is a rank 0 already"));
        let mut other_version = b"fastlora".to_vec();
        other_version.extend([9; 14]);
        let mut stream = connect();
        stream.write_all(&other_version).unwrap();
        assert!(hear_answer(&stream).unwrap().unwrap_err().contains("another version"));
        let error = join(&address.to_string(), 2, 3, LONG, || Ok(())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains("does not take this process: it is rank 2 of 3"), "{error}");
        let other = scope
            .spawn(move || join(&address.to_string(), 1, 2, LONG, || Ok(())).unwrap().gather(b"b").unwrap());
        let gathered = group.join().unwrap().gather(b"a").unwrap();
        assert_eq!(other.join().unwrap(), gathered);
        gathered
    });
    assert_eq!(group, [b"a", b"b"]);
}

#[test]
fn places_that_do_not_exist_are_refused() {
    for (rank, world_size) in [(0, 2), (2, 2), (0, 0), (1, usize::MAX)] {
        let error = join("127.0.0.1:1", rank, world_size, SHORT, || Ok(())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    }
    assert_eq!(Host::bind((Ipv4Addr::LOCALHOST, 0), 0).unwrap_err().kind(), ErrorKind::Config);
}

#[test]
fn fault_64_two_processes_with_one_rank_are_refused() {
    let host = host(3);
    let address: SocketAddr = host.address();
    thread::scope(|scope| {
        let first = scope.spawn(|| host.accept(LONG, || Ok(())).unwrap());
        let twins: Vec<_> =
            (0..2).map(|_| scope.spawn(move || join(&address.to_string(), 1, 3, LONG, || Ok(())))).collect();
        // Until one of the two is refused the third does not come.
        while !twins.iter().any(|twin| twin.is_finished()) {
            thread::sleep(Duration::from_millis(1));
        }
        let third = scope.spawn(move || join(&address.to_string(), 2, 3, LONG, || Ok(())));
        let mut groups = vec![first.join().unwrap(), third.join().unwrap().unwrap()];
        let mut refusals = Vec::new();
        for twin in twins {
            match twin.join().unwrap() {
                Ok(group) => groups.push(group),
                Err(error) => refusals.push(error.to_string()),
            }
        }
        assert_eq!((groups.len(), refusals.len()), (3, 1));
        assert!(refusals[0].contains("there is a rank 1 already"), "{refusals:?}");
    });
}

#[test]
fn fault_65_who_does_not_come_is_named() {
    let error = host(3).accept(SHORT, || Ok(())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("rank 1, 2 did not come"), "{error}");
    let error = host(2).accept(LONG, || Err(Error::io("rank 1 has ended"))).unwrap_err();
    assert!(error.to_string().contains("rank 1 has ended"), "{error}");
    // No other test listens there.
    let address = "127.0.0.1:1";
    let error = join(address, 1, 2, SHORT, || Ok(())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("rank 0 cannot be reached"), "{error}");
    let error = join(address, 1, 2, LONG, || Err(Error::io("rank 0 has ended"))).unwrap_err();
    assert!(error.to_string().contains("rank 0 has ended"), "{error}");
    assert!(join("nowhere.invalid:1", 1, 2, SHORT, || Ok(())).is_err());
}

#[test]
fn fault_65_a_process_that_dies_is_named_by_all_others() {
    for world_size in 2..=5 {
        for dying in 0..world_size {
            let errors = on_each(world_size, LONG, |mut group| {
                group.gather(b"here").unwrap();
                if group.rank() == dying {
                    return None;
                }
                // Short messages are sent before the loss is noticed, long ones are not.
                let mut values = vec![1.0; if dying % 2 == 0 { 7 } else { 1 << 20 }];
                let error = group.sum(&mut values).unwrap_err();
                // And it stays so.
                assert!(group.gather(b"still").is_err());
                Some(error)
            });
            for error in errors.into_iter().flatten() {
                assert_eq!(error.kind(), ErrorKind::Io);
                let name = format!("rank {dying} is gone");
                assert!(error.to_string().contains(&name), "{world_size}: {name}, but {error}");
            }
        }
    }
}

#[test]
fn fault_65_a_process_that_hangs_is_noticed() {
    let host = host(2);
    let address = host.address().to_string();
    // Connected and silent, until the other gives up.
    let silent = thread::spawn(move || {
        let mut group = join(&address, 1, 2, LONG, || Ok(())).unwrap();
        loop {
            if let Err(error) = group.ring.receive(&mut Vec::new(), 0..=100) {
                return error;
            }
        }
    });
    let error = host.accept(TO_MEET, || Ok(())).unwrap().gather(b"here").unwrap_err();
    for error in [error, silent.join().unwrap()] {
        assert!(error.to_string().contains("rank 1 has said nothing for too long"), "{error}");
    }
}

#[test]
fn fault_65_the_reason_of_an_end_goes_around() {
    for world_size in 2..=4 {
        for failing in 0..world_size {
            let errors = on_each(world_size, LONG, |mut group| {
                if group.rank() == failing {
                    group.abort(&Error::device("out of memory"));
                    return None;
                }
                group.gather(b"here").err()
            });
            assert_eq!(errors.iter().flatten().count(), world_size - 1);
            for error in errors.into_iter().flatten() {
                assert_eq!(error.kind(), ErrorKind::Device, "{error}");
                let text = format!("rank {failing} has failed: out of memory");
                assert!(error.to_string().contains(&text), "{error}");
            }
        }
    }
}

#[test]
fn processes_that_do_not_do_the_same_fail_instead_of_waiting() {
    let errors = on_each(3, LONG, |mut group| {
        let mut values = vec![0.0; if group.rank() == 1 { 30 } else { 31 }];
        group.sum(&mut values).and_then(|()| group.gather(b"")).err()
    });
    for error in errors {
        let error = error.unwrap().to_string();
        assert!(error.contains("bytes, expected"), "{error}");
    }
}
