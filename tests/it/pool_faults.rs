//! Faults, one after the other, while clients ask all the time. Lost may be only what is being answered; no text may be
//! wrong; and in the end all is well although no human did anything.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::harness::llama_server::{Program, answer_of};
use crate::harness::pool::{Pool, Setup};
use crate::harness::worker::children;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

/// A request that takes longer hangs.
const HANGS: Duration = Duration::from_secs(75);
/// All clients must have had a whole answer so long after a fault.
const RECOVERY: Duration = Duration::from_secs(15);
/// What systemd waits before it starts a service again (`RestartSec`).
const RESTART: Duration = Duration::from_millis(100);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_survives_some_random_faults() {
    survives(8, Duration::from_millis(1500)).await;
}

/// All kinds of faults and some more; takes some minutes.
///
/// `cargo nextest run --test it pool_faults:: --run-ignored only --no-capture`, with `FAULTS_SEED` to repeat a run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes some minutes"]
async fn a_pool_survives_fifty_random_faults() {
    survives(50, Duration::from_secs(6)).await;
}

#[derive(Debug, Clone, Copy)]
enum Victim {
    RpcServer(usize),
    Worker(usize),
    Coordinator,
    LlamaServer,
}

#[derive(Debug, Clone, Copy)]
enum Blow {
    Kill,
    /// SIGSTOP, and SIGCONT after a while.
    Pause,
    PauseAndKill,
}

/// What is done to the pool.
#[derive(Debug, Clone, Copy)]
struct Fault {
    victim: Victim,
    blow: Blow,
    /// A second time, as soon as the victim is there again.
    twice: bool,
    pause: Duration,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {:?}", self.blow, self.victim)?;
        if !matches!(self.blow, Blow::Kill) {
            write!(f, " {:.1} s", self.pause.as_secs_f32())?;
        }
        f.write_str(if self.twice { " twice" } else { "" })
    }
}

/// All kinds in any order, and then any.
fn faults(random: &mut StdRng, count: usize, longest: Duration) -> Vec<Fault> {
    let victims = [
        Victim::RpcServer(0),
        Victim::RpcServer(1),
        Victim::Worker(0),
        Victim::Worker(1),
        Victim::Coordinator,
        Victim::LlamaServer,
    ];
    let mut faults = Vec::new();
    while faults.len() < count {
        let mut all = Vec::new();
        for victim in victims {
            for blow in [Blow::Kill, Blow::Pause, Blow::PauseAndKill] {
                for twice in [false, true] {
                    // Most pauses are too short to be noticed, some are not.
                    let share = random.random::<f64>().powi(3);
                    let pause = Duration::from_millis(100) + longest.mul_f64(share);
                    all.push(Fault {
                        victim,
                        blow,
                        twice,
                        pause,
                    });
                }
            }
        }
        all.shuffle(random);
        faults.extend(all);
    }
    faults.truncate(count);
    faults
}

/// What the clients got.
#[derive(Default)]
struct Tally(Mutex<Counts>);

#[derive(Default)]
struct Counts {
    right: usize,
    lost: BTreeMap<String, usize>,
    wrong: Vec<String>,
    /// When the last whole answer of each client was asked for.
    last: BTreeMap<usize, Instant>,
}

impl Tally {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lost(&self) -> usize {
        self.counts().lost.values().sum()
    }

    fn well_since(&self, when: Instant) -> bool {
        let counts = self.counts();
        counts.last.len() == PROMPTS.len() && counts.last.values().all(|asked| *asked >= when)
    }
}

const PROMPTS: [&str; 3] = [
    "Once upon a time",
    "The little dog",
    "let größe = numbers[42].unwrap();",
];

fn streams(number: usize) -> bool {
    number.is_multiple_of(2)
}

fn body(number: usize) -> Value {
    json!({
        "model": "big", "prompt": PROMPTS[number], "max_tokens": 64, "temperature": 0, "ignore_eos": true,
        "cache_prompt": false, "stream": streams(number),
    })
}

/// What came of a request.
enum Outcome {
    Right,
    /// Why, in a word.
    Lost(String),
    Wrong(String),
}

async fn ask(client: &reqwest::Client, url: &str, number: usize, expected: &str) -> Outcome {
    let broken = |error: &reqwest::Error| {
        if error.is_timeout() {
            Outcome::Wrong(format!("client {number} hangs"))
        } else {
            Outcome::Lost("connection".to_owned())
        }
    };
    let request = client.post(format!("{url}/v1/completions")).json(&body(number));
    let mut answer = match request.timeout(HANGS).send().await {
        Ok(answer) => answer,
        Err(error) => return broken(&error),
    };
    let (status, mut bytes) = (answer.status().as_u16(), Vec::new());
    let broke = loop {
        match answer.chunk().await {
            Ok(Some(chunk)) => bytes.extend(chunk),
            Ok(None) => break None,
            Err(error) => break Some(broken(&error)),
        }
    };
    let text = String::from_utf8_lossy(&bytes);
    if status != 200 || !streams(number) {
        return broke.unwrap_or_else(|| judge(status, &text, expected));
    }
    let (came, end) = streamed(&text);
    if !expected.starts_with(&came) {
        return Outcome::Wrong(format!("client {number}: {came:?} instead of {expected:?}"));
    }
    match (broke, end) {
        (_, Some(End::Error(code))) => Outcome::Lost(format!("event {code}")),
        (Some(broke), _) => broke,
        (None, Some(End::Done)) if came == expected => Outcome::Right,
        (None, _) => Outcome::Wrong(format!("client {number}: a stream just ends: {text}")),
    }
}

/// An answer in one piece.
fn judge(status: u16, text: &str, expected: &str) -> Outcome {
    let answer: Value = serde_json::from_str(text).unwrap_or_default();
    if status == 200 && answer["choices"][0]["text"] == expected {
        return Outcome::Right;
    }
    match answer["error"]["message"].as_str() {
        Some(_) if status >= 500 => Outcome::Lost(format!("{status} {}", answer["error"]["code"])),
        _ => Outcome::Wrong(format!("{status} {text} instead of {expected:?}")),
    }
}

enum End {
    Done,
    Error(Value),
}

/// The text of a stream, and how it ended.
fn streamed(text: &str) -> (String, Option<End>) {
    let (mut came, mut end) = (String::new(), None);
    // What follows the last newline may be half an event.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    for data in whole.lines().filter_map(|line| line.strip_prefix("data: ")) {
        if data == "[DONE]" {
            end = Some(End::Done);
        } else if let Ok(event) = serde_json::from_str::<Value>(data) {
            came.push_str(event["choices"][0]["text"].as_str().unwrap_or_default());
            if !event["error"].is_null() {
                end = Some(End::Error(event["error"]["code"].clone()));
            }
        }
    }
    (came, end)
}

async fn client(url: String, number: usize, expected: String, tally: Arc<Tally>, stop: CancellationToken) {
    let http = reqwest::Client::new();
    while !stop.is_cancelled() {
        let asked = Instant::now();
        let outcome = ask(&http, &url, number, &expected).await;
        let lost = {
            let mut counts = tally.counts();
            match outcome {
                Outcome::Right => {
                    counts.right += 1;
                    counts.last.insert(number, asked);
                    false
                }
                Outcome::Lost(why) => {
                    *counts.lost.entry(why).or_default() += 1;
                    true
                }
                Outcome::Wrong(what) => {
                    counts.wrong.push(what);
                    true
                }
            }
        };
        if lost {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

/// Starts what has ended, as systemd would. The number of starts.
async fn revive(pool: &mut Pool) -> usize {
    let ended = |program: &mut Option<Program>| program.as_mut().is_none_or(|program| !program.is_alive());
    let dead: Vec<usize> = (0..2).filter(|index| ended(&mut pool.workers[*index])).collect();
    let coordinator = ended(&mut pool.coordinator);
    let count = dead.len() + usize::from(coordinator);
    if count > 0 {
        tokio::time::sleep(RESTART).await;
    }
    for index in dead {
        pool.start_worker(index);
    }
    if coordinator {
        pool.start_coordinator();
    }
    count
}

/// A process that runs, whoever may get its number after it.
fn find(pool: &Pool, victim: Victim) -> Option<OwnedFd> {
    let pid_of = |program: &Option<Program>| program.as_ref()?.known_pid();
    let child = |program: &Option<Program>, name: &str, argument: &str| {
        children(pid_of(program)?).into_iter().find(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            let program = line.split('\0').next().unwrap_or_default();
            program.ends_with(name) && line.contains(argument)
        })
    };
    let pid = match victim {
        Victim::RpcServer(index) => child(&pool.workers[index], "ggml-rpc-server", "--port"),
        Victim::Worker(index) => pid_of(&pool.workers[index]),
        Victim::Coordinator => pid_of(&pool.coordinator),
        Victim::LlamaServer => child(&pool.coordinator, "llama-server", "--port"),
    };
    pidfd_open(Pid::from_raw(pid?.cast_signed())?, PidfdFlags::empty()).ok()
}

async fn strike(pool: &mut Pool, fault: Fault) -> usize {
    let (began, mut starts) = (Instant::now(), 0);
    let victim = loop {
        starts += revive(pool).await;
        if let Some(victim) = find(pool, fault.victim) {
            break victim;
        }
        assert!(began.elapsed() < RECOVERY, "there is no {:?}", fault.victim);
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    // It may have ended meanwhile, for a reason of its own.
    let send = |signal| {
        let _ = pidfd_send_signal(&victim, signal);
    };
    if !matches!(fault.blow, Blow::Kill) {
        send(Signal::STOP);
        tokio::time::sleep(fault.pause).await;
    }
    send(if matches!(fault.blow, Blow::Pause) {
        Signal::CONT
    } else {
        Signal::KILL
    });
    // What was killed is not found a second time.
    let gone = Instant::now();
    while !matches!(fault.blow, Blow::Pause)
        && pidfd_send_signal(&victim, Signal::CONT).is_ok()
        && gone.elapsed() < Duration::from_secs(2)
    {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    starts
}

async fn survives(count: usize, longest: Duration) {
    let seed = std::env::var("FAULTS_SEED").ok();
    let seed = seed.map_or_else(rand::random, |seed| seed.parse::<u64>().expect("a number"));
    println!("FAULTS_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    // With one slot, since the texts of requests that share a batch may differ where two tokens are about equally likely.
    let mut pool = Pool::ready(Setup {
        coordinator: json!({ "slots": 1, "stall_seconds": 3, "wait_seconds": 60, "drain_seconds": 5 }),
        ..Setup::default()
    })
    .await;
    let (tally, stop) = (Arc::new(Tally::default()), CancellationToken::new());
    let mut clients = Vec::new();
    for number in 0..PROMPTS.len() {
        let mut plain = body(number);
        plain["stream"] = false.into();
        let (status, answer) = answer_of(pool.post("/v1/completions", &plain)).await;
        assert_eq!(status, 200, "{answer}");
        let expected = answer["choices"][0]["text"].as_str().expect("a text").to_owned();
        let url = pool.url().to_owned();
        clients.push(tokio::spawn(client(
            url,
            number,
            expected,
            Arc::clone(&tally),
            stop.clone(),
        )));
    }
    recover(&mut pool, &tally, "the start").await;
    assert_eq!(tally.lost(), 0, "{:?}", tally.counts().lost);
    let mut slowest = Duration::ZERO;
    for (index, fault) in faults(&mut random, count, longest).into_iter().enumerate() {
        let lost = tally.lost();
        let mut starts = 0;
        for _ in 0..=usize::from(fault.twice) {
            starts += strike(&mut pool, fault).await;
        }
        let (took, more) = recover(&mut pool, &tally, &fault.to_string()).await;
        slowest = slowest.max(took);
        println!(
            "{:2} {fault}: well after {:.1} s, {} lost, {} restarts",
            index + 1,
            took.as_secs_f32(),
            tally.lost() - lost,
            starts + more
        );
    }
    // In peace nothing is lost.
    let lost = tally.lost();
    tokio::time::sleep(Duration::from_secs(2)).await;
    recover(&mut pool, &tally, "the end").await;
    assert_eq!(tally.lost(), lost, "{:?}", tally.counts().lost);
    stop.cancel();
    for client in clients {
        client.await.expect("it does not panic");
    }
    let counts = tally.counts();
    println!(
        "{count} faults: {} right, {} lost {:?}, slowest recovery {:.1} s",
        counts.right,
        counts.lost.values().sum::<usize>(),
        counts.lost,
        slowest.as_secs_f32()
    );
    assert!(counts.wrong.is_empty(), "{:#?}", counts.wrong);
}

/// Waits until every client has had a whole answer that it asked for since now. How long that took, and how many
/// supervisors had to be started.
async fn recover(pool: &mut Pool, tally: &Tally, after: &str) -> (Duration, usize) {
    let (since, mut starts) = (Instant::now(), 0);
    while !tally.well_since(since) {
        starts += revive(pool).await;
        if since.elapsed() > RECOVERY {
            let status = tokio::time::timeout(Duration::from_secs(3), pool.status()).await;
            panic!("not well again after {after}: {status:#?}\n{:?}", tally.counts().lost);
        }
        let wrong = tally.counts().wrong.clone();
        assert!(wrong.is_empty(), "after {after}: {wrong:#?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    (since.elapsed(), starts)
}
