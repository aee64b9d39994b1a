//! `tightwad run worker` with real `ggml-rpc-server`s on the CPU, asked as a coordinator asks it.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use crate::harness::llama_server::{LlamaServer, free_port, target};
use crate::harness::wait::eventually;
use crate::harness::worker::{Worker, config, is_listening, lease_request, lives, run_worker, send};
use rustix::process::Signal;
use serde_json::json;
use tightwad::pool::agent::EndpointState;
use tightwad::pool::agent_client::AgentError;
use tightwad::pool::rpc_probe::probe;

/// Long enough for a machine with other things to do.
const SOON: Duration = Duration::from_secs(20);

/// Waits until something is so.
async fn until(what: &str, is_so: impl Fn() -> bool) {
    let so = eventually(SOON, || async { is_so().then_some(()).ok_or(()) });
    assert!(so.await.is_ok(), "not so after {SOON:?}: {what}");
}

#[tokio::test]
async fn a_leased_worker_serves_a_model_until_it_is_given_back() {
    let worker = Worker::start().await;
    let client = worker.client();
    let port = worker.rpc_ports[0];

    let idle = worker.becomes(EndpointState::Idle, SOON).await;
    assert_eq!((idle.name.as_str(), idle.build.as_str()), ("w", "b11434"));
    assert_eq!(idle.protocol.as_deref(), Some("7.0.0"));
    assert_eq!(idle.lease, None);
    assert_eq!(idle.endpoints[0].port, port);
    let device = &idle.endpoints[0].devices[0];
    assert_eq!(device.name, "CPU");
    assert!(
        device.total_bytes >= device.free_bytes && device.free_bytes > 0,
        "{device:?}"
    );
    assert!(!is_listening(port));

    let lease = client.lease(&lease_request("me:1", 1)).await.unwrap();
    let listening = client.status().await.unwrap();
    assert_eq!(listening.endpoints[0].state, EndpointState::Listening);
    assert_eq!(listening.lease.unwrap().holder, "me:1");
    assert_eq!(worker.servers().len(), 1);

    let endpoint = format!("127.0.0.1:{port}");
    let args = ["--rpc", &endpoint, "--device", "RPC0", "-ngl", "99"];
    let model = target();
    let (server, renewed) = tokio::join!(LlamaServer::start(&model, &args), client.renew(&lease.id));
    renewed.unwrap();
    let answer = server
        .post("/completion", &json!({ "prompt": "Once", "n_predict": 4 }))
        .await;
    assert_eq!(answer["tokens_predicted"], 4);
    client.renew(&lease.id).await.unwrap();
    let asked = Instant::now();
    let connected = client.status().await.unwrap();
    assert!(asked.elapsed() < Duration::from_millis(500), "{:?}", asked.elapsed());
    assert_eq!(connected.endpoints[0].state, EndpointState::Connected);
    assert!(
        connected.last_lines.iter().any(|line| line.contains("Accepted client")),
        "{:?}",
        connected.last_lines
    );

    // Its server has a client all the while, and ends with it all the same.
    let servers = worker.servers();
    client.give_back(&lease.id).await.unwrap();
    assert!(!lives(servers[0]), "the server outlives its lease");
    assert!(!is_listening(port));
    let next = client.lease(&lease_request("me:1", 2)).await.unwrap();
    let fresh = client.status().await.unwrap();
    assert_eq!(fresh.endpoints[0].state, EndpointState::Listening);
    client.give_back(&next.id).await.unwrap();
    worker.becomes(EndpointState::Idle, SOON).await;
    let again = client.give_back(&lease.id).await;
    assert!(matches!(again, Err(AgentError::Over { .. })), "{again:?}");
}

#[tokio::test]
async fn a_higher_epoch_of_the_same_holder_gets_fresh_servers_and_ends_the_old() {
    let worker = Worker::start().await;
    let client = worker.client();
    let first = client.lease(&lease_request("me:1", 5)).await.unwrap();
    let old = worker.servers();

    for (holder, epoch) in [("me:1", 5), ("me:1", 4), ("you:1", 9)] {
        let refused = client.lease(&lease_request(holder, epoch)).await.unwrap_err();
        let AgentError::Held { holder, .. } = &refused else {
            panic!("{refused:?}")
        };
        assert_eq!((holder.holder.as_str(), holder.epoch), ("me:1", 5));
        assert!(refused.to_string().contains("me:1"), "{refused}");
    }
    assert_eq!(worker.servers(), old);

    let second = client.lease(&lease_request("me:1", 6)).await.unwrap();
    let new = worker.servers();
    assert!(!lives(old[0]));
    assert_eq!(new.len(), 1);
    let over = client.renew(&first.id).await;
    assert!(matches!(over, Err(AgentError::Over { .. })), "{over:?}");
    client.renew(&second.id).await.unwrap();
}

/// A worker whose server does not begin to listen as long as a file `slow` is in its folder.
async fn slow_worker() -> Worker {
    let worker = Worker::start_as("cache_gb: 0", |config, folder| {
        let script = folder.join("rpc-server");
        let real = config.lines().last().and_then(|line| line.rsplit_once("rpc_server: "));
        let real = real.unwrap().1.trim_end_matches(" }").to_owned();
        let slow = folder.join("slow");
        let text = format!(
            "#!/bin/sh\n[ -e '{}' ] && exec sleep 60\nexec '{real}' \"$@\"\n",
            slow.display()
        );
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        config.replace(&real, script.to_str().unwrap())
    })
    .await;
    fs::write(worker.folder().join("slow"), "").unwrap();
    worker
}

#[tokio::test]
async fn whoever_stops_waiting_for_a_lease_does_not_get_it() {
    let worker = slow_worker().await;
    let client = worker.client();
    let waiting = tokio::spawn(async move { client.lease(&lease_request("me:1", 1)).await });
    worker.becomes(EndpointState::Starting, SOON).await;
    until("a server has started", || !worker.servers().is_empty()).await;
    let server = worker.servers()[0];
    waiting.abort();
    until("the server has ended", || !lives(server)).await;
    let status = worker.becomes(EndpointState::Idle, SOON).await;
    assert_eq!(status.lease, None);
}

#[tokio::test]
async fn a_lease_is_taken_over_while_its_servers_start() {
    let worker = slow_worker().await;
    let client = worker.client();
    let waiting = tokio::spawn(async move { client.lease(&lease_request("me:1", 1)).await });
    worker.becomes(EndpointState::Starting, SOON).await;
    fs::remove_file(worker.folder().join("slow")).unwrap();
    let client = worker.client();
    let lease = client.lease(&lease_request("me:1", 2)).await.unwrap();
    let first = waiting.await.unwrap().unwrap_err();
    assert!(
        matches!(&first, AgentError::Held { holder, .. } if holder.epoch == 2),
        "{first:?}"
    );
    assert_eq!(worker.servers().len(), 1);
    client.renew(&lease.id).await.unwrap();
}

#[tokio::test]
async fn a_lease_that_nobody_renews_ends_and_the_next_coordinator_gets_the_worker() {
    let worker = Worker::start().await;
    let client = worker.client();
    let taken = Instant::now();
    let lease = client.lease(&lease_request("me:1", 1)).await.unwrap();
    let server = worker.servers()[0];
    until("the server has ended", || !lives(server)).await;
    let lasted = taken.elapsed().as_secs_f64();
    assert!(lasted > lease.expires_seconds as f64 - 0.5, "only {lasted} s");
    assert_eq!(client.status().await.unwrap().lease, None);
    client.lease(&lease_request("you:1", 1)).await.unwrap();
}

#[tokio::test]
async fn a_server_that_is_killed_stays_failed_until_the_next_lease() {
    let worker = Worker::start().await;
    let client = worker.client();
    let lease = client.lease(&lease_request("me:1", 1)).await.unwrap();
    let server = worker.servers()[0];
    send(server, Signal::KILL);
    let failed = worker.becomes(EndpointState::Failed, SOON).await;
    assert!(failed.lease.is_some());
    // Longer than the pause after which a server without an agent is started again.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let renewal = client.renew(&lease.id).await.unwrap();
    assert_eq!(renewal.endpoints[0].state, EndpointState::Failed);
    assert!(worker.servers().is_empty());
    let next = client.lease(&lease_request("me:1", 2)).await.unwrap();
    let renewal = client.renew(&next.id).await.unwrap();
    assert_eq!(renewal.endpoints[0].state, EndpointState::Listening);
}

#[tokio::test]
async fn a_long_check_of_the_cache_is_told_at_once_and_made_to_its_end() {
    let worker = Worker::start_with(1, "cache_gb: 1, cache_dir: FOLDER/cache").await;
    let folder = worker.folder().join("cache/rpc");
    fs::create_dir_all(&folder).unwrap();
    // All holes: it takes a while to read, and no place.
    let broken = folder.join("0123456789abcdef");
    fs::File::create(&broken).unwrap().set_len(1 << 30).unwrap();
    let client = worker.client();
    let asked = Instant::now();
    let refused = client.lease(&lease_request("me:1", 1)).await.unwrap_err();
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    assert!(
        matches!(&refused, AgentError::Refused { reason, .. } if reason.contains("of 1.0 GiB")),
        "{refused:?}"
    );
    let asked = eventually(Duration::from_secs(120), || async {
        client.lease(&lease_request("me:1", 1)).await
    });
    let leased = asked.await;
    assert!(leased.is_ok(), "{leased:?}");
    assert!(!broken.exists());
}

#[tokio::test]
async fn a_server_that_is_stopped_ends_with_its_lease_all_the_same() {
    let worker = Worker::start().await;
    let client = worker.client();
    let lease = client.lease(&lease_request("me:1", 1)).await.unwrap();
    let server = worker.servers()[0];
    send(server, Signal::STOP);
    client.give_back(&lease.id).await.unwrap();
    assert!(!lives(server));
}

#[tokio::test]
async fn whoever_does_not_know_the_token_is_told_nothing() {
    let worker = Worker::start().await;
    for token in [None, Some("guessed")] {
        let client = worker.client_with(token);
        let told = client.status().await;
        assert!(matches!(told, Err(AgentError::Unauthorized { .. })), "{told:?}");
        let leased = client.lease(&lease_request("me:1", 1)).await;
        assert!(matches!(leased, Err(AgentError::Unauthorized { .. })), "{leased:?}");
    }
    assert_eq!(worker.client().status().await.unwrap().lease, None);
}

#[tokio::test]
async fn every_endpoint_of_a_host_gets_a_server_of_its_own() {
    let worker = Worker::start_with(2, "cache_gb: 0").await;
    let client = worker.client();
    let lease = client.lease(&lease_request("me:1", 1)).await.unwrap();
    let status = worker.becomes(EndpointState::Listening, SOON).await;
    let mut ports: Vec<u16> = status.endpoints.iter().map(|endpoint| endpoint.port).collect();
    let mut wanted = worker.rpc_ports.clone();
    ports.sort_unstable();
    wanted.sort_unstable();
    assert_eq!(ports, wanted);
    assert_eq!(worker.servers().len(), 2);
    client.give_back(&lease.id).await.unwrap();
    assert!(worker.rpc_ports.iter().all(|port| !is_listening(*port)));
}

#[tokio::test]
async fn the_cache_keeps_to_its_quota_and_holds_no_part_that_was_cut_off() {
    // 1073 bytes.
    let worker = Worker::start_with(1, "cache_gb: 0.000001, cache_dir: FOLDER/cache").await;
    let folder = worker.folder().join("cache/rpc");
    fs::create_dir_all(&folder).unwrap();
    let part = |byte: u8, minutes: u64| {
        let content = [byte; 500];
        let hash = content.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let path = folder.join(format!("{hash:016x}"));
        fs::write(&path, content).unwrap();
        let then = std::time::SystemTime::now() - Duration::from_secs(60 * minutes);
        let times = fs::FileTimes::new().set_accessed(then).set_modified(then);
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_times(times).unwrap();
        path
    };
    let (recent, oldest, old) = (part(1, 1), part(2, 30), part(3, 10));
    let cut_off = part(4, 0);
    fs::write(&cut_off, [4; 400]).unwrap();

    let client = worker.client();
    client.lease(&lease_request("me:1", 1)).await.unwrap();
    assert!(!cut_off.exists() && !oldest.exists());
    assert!(old.exists() && recent.exists());
    let status = client.status().await.unwrap();
    assert_eq!((status.cache_bytes, status.cache_quota_bytes), (1000, 1073));
}

#[tokio::test]
async fn being_told_to_end_it_ends_its_servers_and_is_content() {
    let mut worker = Worker::start().await;
    worker.client().lease(&lease_request("me:1", 1)).await.unwrap();
    let server = worker.servers()[0];
    worker.signal(Signal::TERM);
    assert_eq!(worker.ended(SOON).await, Some(0), "{}", worker.log());
    assert!(!lives(server));
    assert!(!is_listening(worker.rpc_ports[0]));
}

#[tokio::test]
async fn a_killed_worker_leaves_no_server() {
    let mut worker = Worker::start().await;
    worker.client().lease(&lease_request("me:1", 1)).await.unwrap();
    let server = worker.servers()[0];
    worker.signal(Signal::KILL);
    worker.ended(SOON).await;
    until("the server has ended", || !lives(server)).await;
}

#[tokio::test]
async fn a_worker_without_an_agent_keeps_its_server_running_for_whoever_comes() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let port = free_port();
    let worker = run_worker(folder.path(), &config(0, &[port], "cache_gb: 1"));
    until("it listens", || is_listening(port)).await;
    let told = probe(SocketAddr::from(([127, 0, 0, 1], port)), SOON).await.unwrap();
    assert_eq!(told.protocol.to_string(), "7.0.0");
    assert!(told.devices[0].total_bytes > 0);
    let server = crate::harness::worker::children(worker.pid())[0];
    send(server, Signal::KILL);
    until("another one listens", || {
        is_listening(port) && matches!(crate::harness::worker::children(worker.pid())[..], [other] if other != server)
    })
    .await;
    assert!(worker.log().contains("without an agent"), "{}", worker.log());
    // Nobody would check what a server wrote that died as it wrote.
    let server = crate::harness::worker::children(worker.pid())[0];
    let args = fs::read_to_string(format!("/proc/{server}/cmdline")).unwrap();
    assert!(!args.contains("--cache"), "{args}");
}

/// Starts a worker that cannot run: its exit code and what it says.
async fn refusal(config: &str) -> (Option<i32>, String) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut worker = run_worker(folder.path(), config);
    let give_up = Instant::now() + SOON;
    while worker.is_alive() && Instant::now() < give_up {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    (worker.exit_code(), worker.log())
}

#[tokio::test]
async fn what_keeps_a_worker_from_running_is_one_sentence_and_an_exit_code() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().map(|address| (address.port(), taken)).unwrap();
    let (agent, rpc) = (free_port(), free_port());
    let fine = config(agent, &[rpc], "cache_gb: 0");
    let cases = [
        (config(agent, &[taken.0], "cache_gb: 0"), 5, "is in use"),
        (config(taken.0, &[rpc], "cache_gb: 0"), 5, "is in use"),
        (
            fine.replace("bin/ggml-rpc-server", "bin/no-such-server"),
            4,
            "no-such-server",
        ),
        (
            fine.replace("host: 127.0.0.1", "host: 192.0.2.1"),
            3,
            "none of the workers (w)",
        ),
        (
            fine.replace("extra_args: [ -t, '1' ]", "extra_args: [ --device, CUDA9 ]"),
            8,
            "unknown device: CUDA9",
        ),
    ];
    for (config, code, sentence) in cases {
        let (exit, said) = refusal(&config).await;
        assert_eq!(exit, Some(code), "{config}\n{said}");
        assert!(said.contains(sentence), "{said}");
    }
}

#[tokio::test]
async fn a_port_that_somebody_else_took_meanwhile_is_told_to_the_coordinator() {
    let worker = Worker::start().await;
    let port = worker.rpc_ports[0];
    let taken = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let client = worker.client();
    let refused = client.lease(&lease_request("me:1", 1)).await.unwrap_err();
    assert!(matches!(refused, AgentError::Refused { .. }), "{refused:?}");
    assert!(refused.to_string().contains(&port.to_string()), "{refused}");
    drop(taken);
    client.lease(&lease_request("me:1", 1)).await.unwrap();
}

#[tokio::test]
async fn a_worker_that_is_not_there_is_unreachable_and_another_server_is_no_agent() {
    let nobody = tightwad::pool::agent_client::AgentClient::at("w", "http://127.0.0.1:1", None).unwrap();
    let error = nobody.status().await.unwrap_err();
    assert!(matches!(error, AgentError::Unreachable { .. }), "{error:?}");
    let server = LlamaServer::start(&target(), &[]).await;
    let other = tightwad::pool::agent_client::AgentClient::at("w", server.url(), None).unwrap();
    let error = other.status().await.unwrap_err();
    assert!(matches!(error, AgentError::NotAnAgent { .. }), "{error:?}");
}
