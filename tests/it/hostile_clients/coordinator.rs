//! The coordinator's public port, with the limits that it has by default: connections and bodies that are held.

use std::time::{Duration, Instant};

use super::connections::read_to_end;
use super::{CHAT, Run, sent};
use crate::harness::llama_server::{answer_of, free_port, llama_cpp, target};
use serde_json::{Value, json as value};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

const COMPLETIONS: &str = "/v1/completions";

/// A coordinator whose worker is down, so that completions wait. It runs after `before` in a shell.
async fn waiting(before: &str, keys: Value) -> (Run, String) {
    let port = free_port();
    let mut config = value!({
        "coordinator": { "port": port, "backend": "cpu", "slots": 4, "wait_seconds": 60 },
        "workers": [{
            "host": "127.0.0.1", "name": "one", "backend": "cpu", "agent_port": free_port(), "cache_gb": 0,
            "gpus": [{ "name": "CPU", "vram_gb": 1, "rpc_port": free_port() }],
        }],
        "models": { "big": { "path": target(), "ctx_size": 2048, "default": true } },
        "binaries": {
            "llama_server": llama_cpp().join("bin/llama-server"), "rpc_server": llama_cpp().join("bin/ggml-rpc-server"),
        },
    });
    if let (Some(all), Value::Object(keys)) = (config["coordinator"].as_object_mut(), keys) {
        all.extend(keys);
    }
    let run = Run::start(before, &["coordinator"], &config.to_string());
    let address = run.listens(port).await;
    (run, address)
}

/// The head of a POST with a body of `length` bytes.
fn head(address: &str, path: &str, length: usize) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    )
}

#[tokio::test]
async fn permission_is_given_by_the_coordinator_without_waiting_for_a_body() {
    for keys in [value!({}), value!({ "api_key": "s3cret" })] {
        let (_run, address) = waiting(":", keys).await;
        let head = format!("OPTIONS {CHAT} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 9000\r\n\r\n{{");
        let mut socket = sent(&address, &head).await;
        let (answer, took) = read_to_end(&mut socket).await;
        assert!(answer.starts_with("HTTP/1.1 204 "), "{answer}");
        assert!(took < Duration::from_secs(3), "{took:?}");
    }
}

/// 128 descriptors are enough for 21 connections, of which one peer may have this many.
const FEW_DESCRIPTORS: (&str, usize) = ("ulimit -n 128", 16);

#[tokio::test]
async fn unfinished_heads_lock_nobody_out_of_the_coordinator() {
    let (run, address) = waiting(FEW_DESCRIPTORS.0, value!({})).await;
    let mut idle = Vec::new();
    for number in 0..60 {
        let text = if number % 2 == 0 { "" } else { "GET / HTTP/1.1\r\nHo" };
        idle.push(sent(&address, text).await);
    }
    let asked = reqwest::get(format!("http://{address}/v1/models"));
    let answer = timeout(Duration::from_secs(5), asked).await.expect("an answer in time");
    assert_eq!(answer.unwrap().status(), 200, "{}", run.program.log());
    let (rest, _) = read_to_end(&mut idle[0]).await;
    assert_eq!(rest, "", "the oldest ones made room");
}

#[tokio::test]
async fn a_coordinator_whose_connections_are_all_at_work_says_so() {
    let (run, address) = waiting(FEW_DESCRIPTORS.0, value!({})).await;
    let body = r#"{"prompt":"a"}"#;
    let request = format!("{}{body}", head(&address, COMPLETIONS, body.len()));
    let mut waiting = Vec::new();
    for _ in 0..FEW_DESCRIPTORS.1 {
        waiting.push(sent(&address, &request).await);
        // A connection whose request has not been read yet is idle, and would make room for another.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let models = || answer_of(reqwest::Client::new().get(format!("http://{address}/v1/models")));
    // Their requests may not have been read yet.
    let refused = crate::harness::wait::eventually(Duration::from_secs(5), || async {
        let (status, body) = models().await;
        if status == 503 { Ok(body) } else { Err(body) }
    });
    let refused = refused
        .await
        .unwrap_or_else(|body| panic!("{body}\n{}", run.program.log()));
    assert_eq!(refused["error"]["code"], "too_many_connections", "{refused}");
    drop(waiting);
    let free = crate::harness::wait::eventually(Duration::from_secs(5), || async {
        let (status, body) = models().await;
        if status == 200 { Ok(()) } else { Err(body) }
    });
    free.await.unwrap();
}

#[tokio::test]
async fn a_body_that_comes_too_slowly_to_the_coordinator_is_cut() {
    let (_run, address) = waiting(":", value!({})).await;
    let mut socket = sent(&address, &format!("{}{{", head(&address, COMPLETIONS, 9000))).await;
    let begun = Instant::now();
    // It has ten seconds.
    tokio::time::sleep(Duration::from_secs(8)).await;
    let (answer, _) = read_to_end(&mut socket).await;
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert!(answer.contains("came too slowly"), "{answer}");
    assert!(begun.elapsed() > Duration::from_millis(9500), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_body_that_is_cut_off_is_not_waited_for_by_the_coordinator() {
    let (_run, address) = waiting(":", value!({})).await;
    let mut socket = sent(&address, &format!("{}{{", head(&address, COMPLETIONS, 9))).await;
    socket.shutdown().await.unwrap();
    let (_, took) = read_to_end(&mut socket).await;
    assert!(took < Duration::from_secs(2), "{took:?}");
}

#[tokio::test]
async fn unfinished_bodies_take_no_more_of_the_coordinators_memory_than_is_set_aside() {
    const MIB: usize = 1024 * 1024;
    let (run, address) = waiting(":", value!({})).await;
    // Together a little less than the 192 MiB that bodies of one peer may take.
    let part = vec![b' '; 63 * MIB];
    let head = head(&address, COMPLETIONS, 64 * MIB);
    let mut unfinished = Vec::new();
    for _ in 0..3 {
        let mut socket = TcpStream::connect(&address).await.unwrap();
        socket.write_all(head.as_bytes()).await.unwrap();
        let _ = socket.write_all(&part).await; // it may be refused in the middle
        unfinished.push(socket);
    }
    let url = format!("http://{address}/tokenize");
    let post = |bytes: usize| {
        let body = format!("{{\"content\":\"{}\"}}", "x".repeat(bytes));
        let request = reqwest::Client::new()
            .post(&url)
            .header("content-type", "application/json");
        answer_of(request.body(body))
    };
    let refused = crate::harness::wait::eventually(Duration::from_secs(5), || async {
        let (status, body) = post(8 * MIB).await;
        if body["error"]["code"] == "overloaded" {
            Ok(status)
        } else {
            Err(body)
        }
    });
    assert_eq!(refused.await.unwrap(), 503);
    let (_, small) = post(10).await;
    assert_eq!(
        small["error"]["code"], "model_loading",
        "a small one is not refused: {small}"
    );
    let status = std::fs::read_to_string(format!("/proc/{}/status", run.program.pid())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: usize = peak.split_whitespace().next().unwrap().parse().unwrap();
    println!("{} MiB at most", peak / 1024);
    drop(unfinished);
    let free = crate::harness::wait::eventually(Duration::from_secs(5), || async {
        let (_, body) = post(8 * MIB).await;
        if body["error"]["code"] == "overloaded" {
            Err(body)
        } else {
            Ok(())
        }
    });
    free.await.unwrap();
}
