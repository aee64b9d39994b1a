//! Finds the entry of `workers` that is this host.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use crate::config::{Config, Worker};

/// Why no entry of `workers` is this host.
#[derive(Debug, thiserror::Error)]
pub enum NotFound {
    /// The config has no workers.
    #[error("the config has no `workers`; add an entry with this host's address as `host`")]
    NoWorkers,
    /// No worker has this name.
    #[error("no worker is called `{wanted}`; the workers are {names}")]
    NoSuchName {
        /// The name asked for.
        wanted: String,
        /// All of them.
        names: String,
    },
    /// No worker has an address of this host.
    #[error(
        "the address of none of the workers ({names}) is this host's; say which one it is: `tightwad run worker NAME`"
    )]
    NotHere {
        /// All of them.
        names: String,
    },
    /// Several workers have an address of this host.
    #[error("several workers are on this host; say which one to run: `tightwad run worker NAME`, one of {names}")]
    Several {
        /// Their names.
        names: String,
    },
    /// Its host is neither an IPv4 address nor the name of one.
    #[error("worker {worker}: `{host}` has no IPv4 address ({reason}); correct `host`")]
    NoAddress {
        /// Its name.
        worker: String,
        /// Its host.
        host: String,
        /// Why.
        reason: String,
    },
}

/// Returns the worker called `wanted` (by name, else by host), or the only one with an address of this host; and its IPv4
/// address, the only form that `ggml-rpc-server` accepts.
pub async fn local_worker<'a>(config: &'a Config, wanted: Option<&str>) -> Result<(&'a Worker, Ipv4Addr), NotFound> {
    let workers = &config.workers;
    if workers.is_empty() {
        return Err(NotFound::NoWorkers);
    }
    if let Some(wanted) = wanted {
        let by_name = workers.iter().find(|worker| worker.name() == wanted);
        let on_host: Vec<&Worker> = workers.iter().filter(|worker| worker.host == wanted).collect();
        let worker = match (by_name, on_host.as_slice()) {
            (Some(worker), _) => worker,
            (None, [only]) => only,
            (None, []) => {
                return Err(NotFound::NoSuchName {
                    wanted: wanted.to_owned(),
                    names: names(workers),
                });
            }
            (None, several) => {
                return Err(NotFound::Several {
                    names: names(several.iter().copied()),
                });
            }
        };
        return Ok((worker, address_of(worker).await?));
    }
    let mut here = Vec::new();
    for worker in workers {
        if let Ok(address) = address_of(worker).await
            && is_own(address)
        {
            here.push((worker, address));
        }
    }
    match here.as_slice() {
        [only] => Ok(*only),
        [] => Err(NotFound::NotHere { names: names(workers) }),
        several => Err(NotFound::Several {
            names: names(several.iter().map(|(worker, _)| *worker)),
        }),
    }
}

async fn address_of(worker: &Worker) -> Result<Ipv4Addr, NotFound> {
    let none = |reason: String| NotFound::NoAddress {
        worker: worker.name().to_owned(),
        host: worker.host.clone(),
        reason,
    };
    let mut found = tokio::net::lookup_host((worker.host.as_str(), 0))
        .await
        .map_err(|error: io::Error| none(error.to_string()))?;
    let address = found.find_map(|address| match address {
        SocketAddr::V4(address) => Some(*address.ip()),
        SocketAddr::V6(_) => None,
    });
    address.ok_or_else(|| none("only an IPv6 one".into()))
}

/// Whether the address belongs to this host: only such an address can be bound.
fn is_own(address: Ipv4Addr) -> bool {
    TcpListener::bind((address, 0)).is_ok()
}

fn names<'a>(workers: impl IntoIterator<Item = &'a Worker>) -> String {
    workers.into_iter().map(Worker::name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(workers: &[(&str, Option<&str>)]) -> Config {
        let workers = workers.iter().map(|(host, name)| Worker {
            name: name.map(str::to_owned),
            ..Worker::at(*host)
        });
        Config {
            workers: workers.collect(),
            ..Config::default()
        }
    }

    async fn found(config: &Config, wanted: Option<&str>) -> Result<String, String> {
        let entry = local_worker(config, wanted).await;
        entry
            .map(|(worker, address)| format!("{} at {address}", worker.name()))
            .map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn the_only_entry_with_an_address_of_this_host_is_it() {
        // 192.0.2.0/24 is nobody's.
        let config = config(&[("192.0.2.1", None), ("localhost", Some("me"))]);
        assert_eq!(found(&config, None).await.unwrap(), "me at 127.0.0.1");
    }

    #[tokio::test]
    async fn of_several_entries_the_name_decides() {
        let config = config(&[("127.0.0.1", Some("a")), ("127.0.0.1", Some("b"))]);
        assert!(found(&config, None).await.unwrap_err().ends_with("one of a, b"));
        assert!(
            found(&config, Some("127.0.0.1"))
                .await
                .unwrap_err()
                .ends_with("one of a, b")
        );
        assert_eq!(found(&config, Some("b")).await.unwrap(), "b at 127.0.0.1");
        assert!(
            found(&config, Some("c"))
                .await
                .unwrap_err()
                .contains("the workers are a, b")
        );
    }

    #[tokio::test]
    async fn a_host_that_is_in_no_entry_is_told_the_names() {
        let elsewhere = config(&[("192.0.2.1", Some("x"))]);
        assert!(found(&elsewhere, None).await.unwrap_err().contains("(x)"));
        assert!(found(&config(&[]), None).await.unwrap_err().contains("no `workers`"));
    }
}
