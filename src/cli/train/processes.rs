//! The processes that train together: how this one knows which it is, and what it computes on.

use std::net::{Ipv4Addr, ToSocketAddrs};
use std::num::NonZero;

use clap::Args;
use tracing::{info, warn};

use super::super::device::DeviceArgs;
use super::launch::{Joined, Workers};
use crate::config::{DeviceName, TrainingConfig};
use crate::device::driver::survey;
use crate::distributed::{Host, PATIENCE, join};
use crate::error::{Error, Result};

/// Set for the processes that `--processes` starts: RANK@ADDRESS.
pub(super) const LAUNCHED: &str = "FASTLORA_LAUNCHED";
/// Set where a server of torchrun's own listens at its MASTER_PORT: the rendezvous is at the port after it.
const TORCH_SERVER: &str = "TORCHELASTIC_USE_AGENT_STORE";
const MOST_PROCESSES: usize = 4096;

/// Arguments that make one run of several processes.
#[derive(Debug, Args)]
pub(super) struct ProcessArgs {
    /// Trains with N processes on this machine: one a GPU (cuda:0 to cuda:N-1), or each with its share of the CPU's threads.
    #[arg(long, value_name = "N", conflicts_with_all = ["world_size", "rank", "rendezvous", "local_rank"])]
    processes: Option<usize>,
    /// Processes of a run that are started one by one, on any machines; else WORLD_SIZE, as torchrun sets it.
    #[arg(long, value_name = "N")]
    world_size: Option<usize>,
    /// Which of them this one is, from 0; else RANK.
    #[arg(long, value_name = "K")]
    rank: Option<usize>,
    /// Where rank 0 listens, as all see it; else MASTER_ADDR and MASTER_PORT.
    #[arg(long, value_name = "HOST:PORT")]
    rendezvous: Option<String>,
    /// Which of this machine's processes this one is: it computes on cuda:K, where the device names none; else LOCAL_RANK.
    #[arg(long, value_name = "K")]
    local_rank: Option<usize>,
}

/// Which of a run's processes this one is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Processes {
    /// The only one.
    Alone,
    /// The first of `count` on this machine, which starts the others.
    Launcher { count: usize },
    /// One of these others.
    Launched { count: usize, rank: usize, address: String },
    /// One that something else started.
    Member { count: usize, rank: usize, rendezvous: String, local_rank: Option<usize> },
}

impl ProcessArgs {
    /// What the arguments say, and else the environment.
    ///
    /// # Errors
    /// Numbers that do not fit together, or no place to meet.
    pub(super) fn resolve(&self) -> Result<Processes> {
        self.resolve_with(|name| std::env::var(name).ok().filter(|text| !text.is_empty()))
    }

    fn resolve_with(&self, variable: impl Fn(&str) -> Option<String>) -> Result<Processes> {
        let number = |name: &str| match variable(name) {
            None => Ok(None),
            Some(text) => text
                .parse::<usize>()
                .map(Some)
                .map_err(|_| Error::config(format!("`{text}` is no number")).at(name)),
        };
        if let Some(count) = self.processes {
            check_count(count, "--processes")?;
            if let Some(launched) = variable(LAUNCHED) {
                let parts = launched.split_once('@');
                let (rank, address) = parts
                    .and_then(|(rank, address)| Some((rank.parse().ok()?, address.to_string())))
                    .ok_or_else(|| Error::config(format!("`{launched}` is no RANK@ADDRESS")).at(LAUNCHED))?;
                return Ok(Processes::Launched { count, rank, address });
            }
            if number("WORLD_SIZE")?.is_some_and(|count| count > 1) && variable("RANK").is_some() {
                return Err(Error::config("something else (torchrun?) starts this run's processes already")
                    .at("--processes")
                    .hint("leave it out, or unset WORLD_SIZE and RANK"));
            }
            return Ok(if count == 1 { Processes::Alone } else { Processes::Launcher { count } });
        }
        let Some(count) = self.world_size.map_or_else(|| number("WORLD_SIZE"), |count| Ok(Some(count)))?
        else {
            return match (self.rank, &self.rendezvous, self.local_rank) {
                (None, None, None) => Ok(Processes::Alone),
                _ => Err(Error::config("there is a rank or a rendezvous, but no number of processes")
                    .at("--world-size")
                    .hint("give it, or set WORLD_SIZE; `--processes N` needs none of them")),
            };
        };
        check_count(count, "--world-size")?;
        let rank = self.rank.map_or_else(|| number("RANK"), |rank| Ok(Some(rank)))?;
        match rank {
            Some(rank) if rank >= count => {
                Err(Error::config(format!("{rank} of {count} processes: ranks are counted from 0"))
                    .at("--rank"))
            }
            _ if count == 1 => Ok(Processes::Alone),
            None => Err(Error::config(format!("which of the {count} processes is this?"))
                .at("--rank")
                .hint("give it, or set RANK; for processes on this machine alone there is `--processes N`")),
            Some(rank) => {
                let local_rank =
                    self.local_rank.map_or_else(|| number("LOCAL_RANK"), |rank| Ok(Some(rank)))?;
                let rendezvous = match &self.rendezvous {
                    Some(rendezvous) => rendezvous.clone(),
                    None => master(&variable, number("MASTER_PORT")?)?,
                };
                Ok(Processes::Member { count, rank, rendezvous, local_rank })
            }
        }
    }
}

/// Where torchrun's variables say that rank 0 is.
fn master(variable: impl Fn(&str) -> Option<String>, port: Option<usize>) -> Result<String> {
    let (Some(host), Some(port)) = (variable("MASTER_ADDR"), port) else {
        return Err(Error::config("the processes have no place to meet").at("--rendezvous").hint(
            "name a host and a free port of the machine of rank 0, or set MASTER_ADDR and MASTER_PORT",
        ));
    };
    let is_taken = variable(TORCH_SERVER).is_some_and(|value| value == "True");
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    Ok(format!("{host}:{}", port + usize::from(is_taken)))
}

fn check_count(count: usize, place: &str) -> Result<()> {
    if (1..=MOST_PROCESSES).contains(&count) {
        return Ok(());
    }
    Err(Error::config(format!("{count} processes")).at(place).hint("it must be 1 to 4096"))
}

impl Processes {
    /// Number of processes.
    pub(super) fn count(&self) -> usize {
        match *self {
            Processes::Alone => 1,
            Processes::Launcher { count }
            | Processes::Launched { count, .. }
            | Processes::Member { count, .. } => count,
        }
    }

    /// This process's number; 0 is the one that writes and reports.
    pub(super) fn rank(&self) -> usize {
        match *self {
            Processes::Alone | Processes::Launcher { .. } => 0,
            Processes::Launched { rank, .. } | Processes::Member { rank, .. } => rank,
        }
    }

    /// Refuses a run that cannot be dealt to so many.
    ///
    /// # Errors
    /// A dry run, or fewer micro-batches in a step than processes.
    pub(super) fn check(&self, config: &TrainingConfig, is_dry_run: bool) -> Result<()> {
        let (count, micro_batches) = (self.count(), config.gradient_accumulation_steps);
        if count > 1 && is_dry_run {
            return Err(Error::config(format!("a dry run is one process, here are {count}"))
                .at("--dry-run")
                .hint("leave one of the two out"));
        }
        if micro_batches < count {
            let what = if micro_batches == 1 { "micro-batch" } else { "micro-batches" };
            return Err(Error::config(format!(
                "a step has {micro_batches} {what}, too few for {count} processes to have one each"
            ))
            .at("gradient_accumulation_steps")
            .hint(format!(
                "raise it to a multiple of {count} and lower batch_size: their product is the step, whose loss stays the same"
            )));
        }
        if !micro_batches.is_multiple_of(count) && self.rank() == 0 {
            warn!(
                "a step's {micro_batches} micro-batches do not come out even among {count} processes: some wait for others"
            );
        }
        Ok(())
    }

    /// What this process computes on: a GPU of its own where there are several on one machine, or its share of the threads.
    ///
    /// # Errors
    /// A GPU by number for several processes, or fewer GPUs than processes.
    pub(super) fn device(&self, config: &TrainingConfig) -> Result<DeviceArgs> {
        let device = DeviceArgs::from(config);
        match *self {
            Processes::Alone | Processes::Member { local_rank: None, .. } => Ok(device),
            Processes::Launcher { count } => on_one_machine(device, 0, count),
            Processes::Launched { count, rank, .. } => on_one_machine(device, rank, count),
            Processes::Member { local_rank: Some(index), .. } => match DeviceName::parse(&device.device)? {
                DeviceName::Cuda { .. } if !names_a_number(&device.device) => Ok(with_gpu(device, index)),
                DeviceName::Auto if device.dtype != "f32" && usable_gpus().is_ok_and(|count| count > 0) => {
                    Ok(with_gpu(device, index))
                }
                _ => Ok(device),
            },
        }
    }

    /// Meets the others, and starts them where that is this one's to do; none where there are none.
    ///
    /// # Errors
    /// A process that does not come, cannot be started, or ends.
    pub(super) fn join(&self) -> Result<Option<Joined>> {
        let (count, rank) = (self.count(), self.rank());
        let (group, workers) = match self {
            Processes::Alone => return Ok(None),
            Processes::Launcher { .. } => {
                let host = Host::bind((Ipv4Addr::LOCALHOST, 0), count)?;
                let mut workers = Workers::start(count, host.address())?;
                (host.accept(PATIENCE, || workers.check())?, workers)
            }
            // The first listened before it started this one.
            Processes::Launched { address, .. } => {
                let group = join(address, rank, count, PATIENCE, || Err(Error::io("rank 0 is gone")))?;
                (group, Workers::default())
            }
            Processes::Member { rendezvous, .. } => {
                let at = |error: Error| error.at(format!("rendezvous {rendezvous}"));
                let address = rendezvous.to_socket_addrs().map_err(|source| {
                    at(Error::config("it is no HOST:PORT that is known here").caused_by(source))
                })?;
                let group = match rank {
                    0 => Host::bind(&address.collect::<Vec<_>>()[..], count)
                        .and_then(|host| {
                            info!("waiting for {} processes at {}", count - 1, host.address());
                            host.accept(PATIENCE, || Ok(()))
                        })
                        .map_err(at)?,
                    _ => join(rendezvous, rank, count, PATIENCE, || Ok(()))?,
                };
                (group, Workers::default())
            }
        };
        info!("{count} processes train together");
        Ok(Some(Joined { group, workers }))
    }
}

/// The device of process `rank` of `count` on this machine.
fn on_one_machine(device: DeviceArgs, rank: usize, count: usize) -> Result<DeviceArgs> {
    let on_cpu = |device: DeviceArgs| {
        let cores = || std::thread::available_parallelism().map_or(1, NonZero::get);
        let threads = device.threads.unwrap_or_else(cores);
        let share = threads / count + usize::from(rank < threads % count);
        DeviceArgs { device: "cpu".into(), threads: Some(share.max(1)), ..device }
    };
    let gpus = match DeviceName::parse(&device.device)? {
        DeviceName::Emulator { .. } => return Ok(device),
        DeviceName::Cpu => return Ok(on_cpu(device)),
        DeviceName::Auto if device.dtype == "f32" => return Ok(on_cpu(device)),
        DeviceName::Auto => match usable_gpus() {
            Ok(gpus) if gpus > 0 => gpus,
            _ => return Ok(on_cpu(device)),
        },
        DeviceName::Cuda { .. } if names_a_number(&device.device) => {
            return Err(Error::config(format!("`{}` is one GPU, for {count} processes", device.device))
                .at("device")
                .hint(
                    "leave the number out: each process takes one; CUDA_VISIBLE_DEVICES says which there are",
                ));
        }
        DeviceName::Cuda { .. } => usable_gpus()?,
    };
    if gpus < count {
        return Err(Error::device(format!("{count} processes need as many GPUs, and there are {gpus}"))
            .at("--processes")
            .hint("start fewer, or give --device cpu"));
    }
    Ok(with_gpu(device, rank))
}

fn with_gpu(device: DeviceArgs, index: usize) -> DeviceArgs {
    let portable = if device.device.ends_with(":portable") { ":portable" } else { "" };
    DeviceArgs { device: format!("cuda:{index}{portable}"), ..device }
}

fn names_a_number(device: &str) -> bool {
    device.split(':').any(|part| part.parse::<u32>().is_ok())
}

/// GPUs that this build can train on.
fn usable_gpus() -> Result<usize> {
    let found = survey();
    found.obstacle.map_or(Ok(found.gpus.len()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Options, TileSource};

    fn arguments(text: &str) -> ProcessArgs {
        #[derive(clap::Parser)]
        struct Only {
            #[command(flatten)]
            processes: ProcessArgs,
        }
        let words = ["train"].into_iter().chain(text.split_whitespace());
        <Only as clap::Parser>::try_parse_from(words).unwrap().processes
    }

    fn resolve(text: &str, variables: &[(&str, &str)]) -> Result<Processes> {
        let find = |name: &str| variables.iter().find(|(known, _)| *known == name);
        arguments(text).resolve_with(|name| find(name).map(|(_, value)| value.to_string()))
    }

    fn member(count: usize, rank: usize, rendezvous: &str, local_rank: Option<usize>) -> Processes {
        Processes::Member { count, rank, rendezvous: rendezvous.into(), local_rank }
    }

    #[test]
    fn a_process_knows_which_it_is() {
        let torchrun = [
            ("WORLD_SIZE", "8"),
            ("RANK", "5"),
            ("LOCAL_RANK", "1"),
            ("MASTER_ADDR", "node0"),
            ("MASTER_PORT", "29500"),
        ];
        let with_server = [&torchrun[..], &[(TORCH_SERVER, "True")]].concat();
        let launched = [(LAUNCHED, "1@127.0.0.1:99")];
        let as_launched = Processes::Launched { count: 2, rank: 1, address: "127.0.0.1:99".into() };
        let flags = "--world-size 2 --rank 1 --rendezvous a:1";
        for (text, variables, expected) in [
            ("", &[][..], Processes::Alone),
            ("", &[("RANK", "3")], Processes::Alone),
            ("", &[("WORLD_SIZE", "1"), ("RANK", "0")], Processes::Alone),
            ("--processes 1", &[], Processes::Alone),
            ("--processes 3", &[], Processes::Launcher { count: 3 }),
            ("--processes 2", &launched, as_launched),
            ("", &torchrun, member(8, 5, "node0:29500", Some(1))),
            ("", &with_server, member(8, 5, "node0:29501", Some(1))),
            (flags, &torchrun, member(2, 1, "a:1", Some(1))),
            (flags, &[], member(2, 1, "a:1", None)),
        ] {
            assert_eq!(resolve(text, variables).unwrap(), expected, "{text} {variables:?}");
        }
        for (text, variables, part) in [
            ("--processes 0", &[][..], "0 processes"),
            ("--processes 2", &torchrun, "starts this run's processes already"),
            ("--rank 1", &[], "no number of processes"),
            ("--world-size 2", &[], "which of the 2 processes"),
            ("--world-size 2 --rank 2", &[], "2 of 2 processes"),
            ("--world-size 2 --rank 1", &[], "no place to meet"),
            ("", &[("WORLD_SIZE", "two")], "WORLD_SIZE: `two` is no number"),
        ] {
            let error = resolve(text, variables).unwrap_err();
            assert_eq!(error.kind().exit_code(), 2);
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn fault_66_a_step_that_cannot_be_dealt_is_refused_with_advice() {
        let config = |steps: &str| {
            let pairs = [format!("gradient_accumulation_steps={steps}")];
            TrainingConfig::resolve(&Options::from_pairs(&pairs).unwrap()).unwrap()
        };
        let three = Processes::Launcher { count: 3 };
        for steps in ["1", "2"] {
            let error = three.check(&config(steps), false).unwrap_err();
            assert_eq!(error.kind().exit_code(), 2);
            assert!(
                error.to_string().contains("raise it to a multiple of 3 and lower batch_size"),
                "{error}"
            );
        }
        three.check(&config("3"), false).unwrap();
        three.check(&config("4"), false).unwrap();
        assert!(
            three.check(&config("3"), true).unwrap_err().to_string().contains("a dry run is one process")
        );
        Processes::Alone.check(&config("1"), true).unwrap();
    }

    #[test]
    fn processes_share_what_the_machine_has() {
        let device = |device: &str, threads| {
            let tiles = TileSource::Rule;
            DeviceArgs { device: device.into(), dtype: "auto".into(), threads, tiles }
        };
        for (threads, count, expected) in
            [(8, 2, &[4, 4][..]), (7, 3, &[3, 2, 2]), (1, 2, &[1, 1]), (6, 1, &[6])]
        {
            let shares: Vec<usize> = (0..count)
                .map(|rank| {
                    on_one_machine(device("cpu", Some(threads)), rank, count).unwrap().threads.unwrap()
                })
                .collect();
            assert_eq!(shares, expected);
        }
        let error = on_one_machine(device("cuda:2", None), 0, 2).unwrap_err();
        assert!(error.to_string().contains("`cuda:2` is one GPU, for 2 processes"), "{error}");
        assert_eq!(with_gpu(device("cuda:portable", None), 3).device, "cuda:3:portable");
        assert_eq!(with_gpu(device("auto", None), 1).device, "cuda:1");
        if usable_gpus().is_err() {
            assert!(on_one_machine(device("cuda", None), 0, 2).is_err());
            let found = on_one_machine(device("auto", Some(2)), 1, 2).unwrap();
            assert_eq!((found.device.as_str(), found.threads), ("cpu", Some(1)));
        }
    }
}
