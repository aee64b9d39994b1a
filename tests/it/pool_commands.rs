//! The pool's commands as their users meet them: start, status, swap, benchmark, stop.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use crate::harness::ended::Ended;
use crate::harness::llama_server::{free_port, target};
use crate::harness::pool::{Pool, Setup, signal};
use crate::harness::wait::eventually;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::process::Command;

/// A pool whose coordinator the commands start and stop.
struct Host {
    pool: Pool,
}

impl Ended {
    /// With this exit code.
    #[track_caller]
    fn with(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{}\n{}", self.stdout, self.stderr);
        self
    }

    #[track_caller]
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }
}

impl Host {
    async fn new(setup: Setup) -> Self {
        let pool = Pool::without_coordinator(setup);
        for index in 0..2 {
            let up = eventually(Duration::from_secs(10), || async {
                if pool.agent_answers(index).await {
                    Ok(())
                } else {
                    Err(())
                }
            });
            up.await.expect("the agent answers");
        }
        Self { pool }
    }

    async fn tightwad(&self, args: &[&str]) -> Ended {
        ended(self.pool.tightwad(args)).await
    }

    /// Whether nobody listens at the coordinator's port.
    async fn is_silent(&self) -> bool {
        reqwest::get(format!("{}/health", self.pool.url())).await.is_err()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // What a test that failed has left in the background.
        let stop = self.pool.tightwad(&["stop"]).into_std().output();
        drop(stop);
    }
}

/// On a screen of 80 columns.
fn narrow(mut command: Command) -> Command {
    command.env("COLUMNS", "80");
    command
}

async fn ended(mut command: Command) -> Ended {
    let output = tokio::time::timeout(Duration::from_secs(60), command.output()).await;
    output.expect("it ends in time").expect("it starts").into()
}

#[tokio::test]
async fn a_pool_is_started_looked_at_swapped_measured_and_stopped() {
    let broken = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let whole = std::fs::read(target()).unwrap();
    std::fs::write(broken.path(), &whole[..whole.len() / 2]).unwrap();
    let models = json!({
        "broken": { "path": broken.path() },
        "huge": { "path": target(), "ctx_size": 500_000_000 },
    });
    let host = Host::new(Setup {
        models,
        ..Setup::default()
    })
    .await;

    let before = host.tightwad(&["status", "--json"]).await.with(7);
    assert!(
        before.json()["hints"][0].as_str().unwrap().contains("tightwad start"),
        "{before:?}"
    );
    assert_eq!(before.json()["workers"][1]["agent"]["up"], true, "{before:?}");

    let started = host.tightwad(&["start", "--json"]).await.with(0);
    assert_eq!(
        (&started.json()["state"], &started.json()["model"]),
        (&json!("ready"), &json!("big"))
    );
    assert!(started.stderr.contains("loading `big`"), "{started:?}");
    let log = std::fs::read_to_string(started.json()["log"].as_str().unwrap()).unwrap();
    assert!(log.contains("the coordinator serves at"), "{log}");
    let again = host.tightwad(&["start", "-m", "big"]).await.with(0);
    assert!(again.stdout.contains("already serves `big`"), "{again:?}");
    let other = host.tightwad(&["start", "-m", "other"]).await.with(5);
    assert!(other.stderr.contains("tightwad swap other"), "{other:?}");

    let (status, answer) = host.pool.complete("big").await;
    assert_eq!(status, 200, "{answer}");
    let table = host.tightwad(&["status"]).await.with(0).stdout;
    for part in [
        "`big` is ready",
        ": layers 0-",
        "leased by",
        "connected",
        "0 answers run, 0 requests wait",
    ] {
        assert!(table.contains(part), "{part} is missing in\n{table}");
    }

    let slip = host.tightwad(&["swap", "othre"]).await.with(3);
    assert!(slip.stderr.contains("did you mean other"), "{slip:?}");
    let swapped = host.tightwad(&["swap", "other"]).await.with(0);
    assert!(
        swapped.stderr.contains("freeing the workers' memory") && swapped.stderr.contains("loading `other`"),
        "{swapped:?}"
    );
    assert_eq!(host.pool.complete("other").await.0, 200);
    let failed = host.tightwad(&["swap", "broken"]).await.with(11);
    let name = broken.path().to_str().unwrap();
    assert!(
        failed.stderr.contains(name) && failed.stderr.contains("now `other` is ready"),
        "{failed:?}"
    );
    host.tightwad(&["swap", "huge"]).await.with(9);
    let back = host.tightwad(&["swap", "big", "--json"]).await.with(0);
    let lines: Vec<Value> = back
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.last().unwrap()["done"], true, "{lines:?}");

    let benchmark = [
        "benchmark",
        "--prompt-sizes",
        "16,64,4096",
        "--batch",
        "1,2,64",
        "--tokens",
        "8",
    ];
    let measured = host
        .tightwad(&[&benchmark[..], &["--json"]].concat())
        .await
        .with(0)
        .json();
    let rows = measured["measured"].as_array().unwrap();
    assert_eq!(rows.len(), 4, "{measured:#}");
    assert!(
        rows.iter()
            .all(|row| row["generated_per_second"].as_f64().unwrap() > 0.0),
        "{measured:#}"
    );
    assert_eq!(measured["left_out"].as_array().unwrap().len(), 2, "{measured:#}");
    let share = measured["network"]["least_share"].as_f64().unwrap();
    assert!(share > 0.0 && share < 1.0, "{measured:#}");
    let table = host.tightwad(&benchmark).await.with(0).stdout;
    assert!(table.contains("left out: prompts of 4096 tokens"), "{table}");

    host.tightwad(&["stop"]).await.with(0);
    assert!(host.is_silent().await);
    assert_eq!(
        [host.pool.lease(0).await, host.pool.lease(1).await],
        [Value::Null, Value::Null]
    );
    host.tightwad(&["stop"]).await.with(7);
    host.tightwad(&["swap", "big"]).await.with(7);
    host.tightwad(&["benchmark"]).await.with(7);
}

#[tokio::test]
async fn what_cannot_start_is_refused_with_a_reason_and_an_exit_code_of_its_own() {
    let broken = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let whole = std::fs::read(target()).unwrap();
    std::fs::write(broken.path(), &whole[..whole.len() / 2]).unwrap();
    let models = json!({
        "broken": { "path": broken.path() },
        "missing": { "path": "/no/such.gguf" },
        "huge": { "path": target(), "ctx_size": 500_000_000 },
    });
    let host = Host::new(Setup {
        models,
        ..Setup::default()
    })
    .await;
    for (model, code, word) in [
        ("broken", 11, broken.path().to_str().unwrap()),
        ("missing", 4, "/no/such.gguf"),
        ("bigg", 3, "did you mean big"),
        ("huge", 9, "does not fit"),
    ] {
        let refused = host.tightwad(&["start", "--json", "-m", model]).await.with(code);
        let told = refused.json();
        assert_eq!((&told["state"], &told["exit"]), (&json!("failed"), &json!(code)));
        assert!(told["error"].as_str().unwrap().contains(word), "{told:#}");
        assert!(refused.stderr.contains(word), "{refused:?}");
    }
    let port = host.pool.url().rsplit(':').next().unwrap().parse().unwrap();
    let _taken = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let taken = host.tightwad(&["start"]).await.with(5);
    assert!(taken.stderr.contains(&port.to_string()), "{taken:?}");
}

#[tokio::test]
async fn a_worker_that_is_away_is_named_and_the_start_is_given_up_after_a_while() {
    let mut host = Host::new(Setup {
        coordinator: json!({ "wait_seconds": 1 }),
        ..Setup::default()
    })
    .await;
    let port = host.pool.kill_worker(1);
    let refused = host.tightwad(&["start"]).await.with(6);
    assert!(refused.stderr.contains("worker two does not answer"), "{refused:?}");
    assert!(refused.stderr.contains("its log is"), "{refused:?}");
    assert!(host.is_silent().await, "nothing is left");

    drop(port);
    host.pool.start_worker(1);
    let up = eventually(Duration::from_secs(10), || async {
        if host.pool.agent_answers(1).await {
            Ok(())
        } else {
            Err(())
        }
    });
    up.await.expect("the agent answers");
    host.tightwad(&["start"]).await.with(0);
    signal(host.pool.workers[1].as_ref().unwrap().pid(), Signal::KILL);
    let lost = eventually(Duration::from_secs(20), || async {
        let told = host.pool.status().await;
        let problem = told["problem"].as_str().unwrap_or_default();
        if problem.contains("worker two ") {
            Ok(())
        } else {
            Err(told)
        }
    });
    lost.await.expect("the coordinator names it");
    let status = host.tightwad(&["status"]).await.with(6);
    let rows = status.stdout.lines();
    let told: Vec<&str> = rows.filter(|row| row.contains("worker two")).collect();
    assert!(
        told.len() == 1 && told[0].contains("tightwad run worker two"),
        "{status:?}"
    );
    let narrow = ended(narrow(host.pool.tightwad(&["status"]))).await.with(6).stdout;
    assert!(narrow.lines().all(|row| row.chars().count() <= 80), "{narrow}");
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let known = words(&status.stdout);
    assert!(
        words(&narrow).iter().filter(|word| !known.contains(word)).count() < 6,
        "{narrow}"
    );
}

#[tokio::test]
async fn ctrl_c_while_the_model_loads_leaves_nothing_running() {
    let host = Host::new(Setup {
        slow: 30.0,
        ..Setup::default()
    })
    .await;
    let start = host.pool.tightwad(&["start"]).spawn().unwrap();
    let pid = start.id().unwrap();
    let loads = eventually(Duration::from_secs(15), || async {
        let answer = reqwest::get(format!("{}/v1/tightwad/status", host.pool.url())).await;
        let told: Value = answer.map_err(drop)?.json().await.map_err(drop)?;
        if told["state"] == "loading" { Ok(()) } else { Err(()) }
    });
    loads.await.expect("it loads");
    let progress = host.tightwad(&["status"]).await.with(6);
    assert!(progress.stdout.contains("loading `big`"), "{progress:?}");
    signal(pid, Signal::INT);
    let left = tokio::time::timeout(Duration::from_secs(20), start.wait_with_output()).await;
    let left = Ended::from(left.expect("it ends").unwrap()).with(130);
    assert!(left.stderr.contains("stopped again"), "{left:?}");
    assert!(host.is_silent().await);
    assert_eq!(host.pool.lease(0).await, Value::Null);
}

/// Waits until the pool is in this state on the way to `other`.
async fn until(host: &Host, state: &str) {
    let reached = eventually(Duration::from_secs(20), || async {
        let told = host.pool.status().await;
        let on_the_way = told["model"] == "other" || told["next"] == "other";
        if told["state"] == state && on_the_way {
            Ok(())
        } else {
            Err(told)
        }
    });
    reached.await.expect("the swap goes on");
}

#[tokio::test]
async fn ctrl_c_in_a_swap_tells_what_becomes_of_it() {
    let mut host = Host::new(Setup {
        slow: 3.0,
        coordinator: json!({ "drain_seconds": 60 }),
        ..Setup::default()
    })
    .await;
    host.pool.start_coordinator();
    host.pool.becomes_ready(Duration::from_secs(30)).await;
    let story = json!({ "prompt": "Once", "max_tokens": 1900, "temperature": 0, "ignore_eos": true, "stream": true });
    let mut story = Some(host.pool.post("/v1/completions", &story).send().await.unwrap());
    // On a busy machine nobody may answer in time.
    let counted = eventually(Duration::from_secs(10), || async {
        let table = host.tightwad(&["status"]).await.stdout;
        if table.contains("1 answer runs, 0 requests wait") {
            Ok(())
        } else {
            Err(table)
        }
    });
    counted.await.expect("the status counts it");
    for (state, says) in [
        ("draining", "interrupted; the swap is taken back, and `big` stays"),
        ("loading", "interrupted; `other` goes on to load without you"),
    ] {
        let swap = host.pool.tightwad(&["swap", "other"]).spawn().unwrap();
        until(&host, state).await;
        // It shows at once what it is told.
        tokio::time::sleep(Duration::from_millis(500)).await;
        signal(swap.id().unwrap(), Signal::INT);
        let left = Ended::from(swap.wait_with_output().await.unwrap()).with(130);
        assert!(left.stderr.contains(says), "{left:?}");
        story.take();
    }
    let done = eventually(Duration::from_secs(20), || async {
        let told = host.pool.status().await;
        if told["state"] == "ready" && told["model"] == "other" {
            Ok(())
        } else {
            Err(told)
        }
    });
    done.await.expect("it goes on to load");
}

#[tokio::test]
async fn a_swap_does_not_wait_for_ever_for_a_coordinator_that_hangs() {
    let host = Host::new(Setup::default()).await;
    let pid = host.tightwad(&["start", "--json"]).await.with(0).json()["pid"].clone();
    let coordinator = u32::try_from(pid.as_u64().unwrap()).unwrap();
    signal(coordinator, Signal::STOP);
    let swap = host.tightwad(&["swap", "other"]).await;
    let status = host.tightwad(&["status"]).await;
    signal(coordinator, Signal::CONT);
    assert!(swap.with(6).stderr.contains("seems to hang"));
    status.with(6);
}

#[tokio::test]
async fn the_status_is_there_at_once_whatever_is_down() {
    // Takes connections and never says a word.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent_port = silent.local_addr().unwrap().port();
    let worker = |host: &str, port: u16| json!({ "host": host, "agent_port": port, "agent_token": "t" });
    let config = json!({
        "coordinator": { "port": silent_port },
        "workers": [
            worker("10.255.255.1", 50051), worker("no-such-host.invalid", 50051), worker("127.0.0.1", silent_port),
            worker("localhost", free_port()),
        ],
        "proxy": { "port": free_port() },
        "models": { "big": { "path": target() } },
    });
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = folder.path().join("pool.yaml");
    std::fs::write(&file, config.to_string()).unwrap();
    let status = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tightwad"));
        command.arg("-c").arg(&file).arg("status").args(args);
        command
    };
    let mut quickest = Duration::MAX;
    for _ in 0..3 {
        let began = Instant::now();
        let shown = ended(status(&["--json"])).await.with(6);
        quickest = quickest.min(began.elapsed());
        let told = shown.json();
        let workers = told["workers"].as_array().unwrap();
        assert!(workers.iter().all(|worker| worker["agent"]["up"] == false), "{told:#}");
        assert_eq!(told["coordinator"]["up"], false, "{told:#}");
        assert!(
            told["proxy"]["problem"].as_str().unwrap().contains("no proxy runs"),
            "{told:#}"
        );
    }
    assert!(quickest < Duration::from_millis(200), "{quickest:?}");

    let mut watch = status(&["--watch", "--json"]);
    watch.stdout(std::process::Stdio::piped()).kill_on_drop(true);
    let mut watch = watch.spawn().unwrap();
    let mut lines = tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(watch.stdout.take().unwrap()));
    for _ in 0..2 {
        let line = tokio::time::timeout(Duration::from_secs(10), lines.next_line()).await;
        let line = line.expect("a look each second").unwrap().unwrap();
        assert!(
            serde_json::from_str::<Value>(&line).unwrap()["workers"].is_array(),
            "{line}"
        );
    }
    signal(watch.id().unwrap(), Signal::INT);
    let left = tokio::time::timeout(Duration::from_secs(10), watch.wait()).await;
    assert!(left.expect("it ends").unwrap().success());
}
