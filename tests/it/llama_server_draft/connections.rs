//! Connections, and clients that go away.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::{completion, server, server_with};
use crate::harness::drafter::{Drafter, new_key};
use crate::harness::llama_server::LlamaServer;
use crate::harness::request::with;
use serde_json::{Value, json};

/// Sends `body` to `path` `times` times over one connection. Each answer ends with `end`.
fn post_over_one_connection(server: &LlamaServer, path: &str, body: &Value, end: &[u8], times: usize) {
    let body = body.to_string();
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut connection = TcpStream::connect(server.url().trim_start_matches("http://")).expect("a connection");
    connection
        .set_read_timeout(Some(Duration::from_secs(20)))
        .expect("a timeout");
    for i in 0..times {
        connection.write_all(request.as_bytes()).expect("it is open");
        let mut answer = Vec::new();
        let mut buffer = [0; 4096];
        while !answer.ends_with(end) {
            let n = connection.read(&mut buffer).expect("an answer");
            assert!(
                n > 0,
                "closed after {i} answers and {}",
                String::from_utf8_lossy(&answer)
            );
            answer.extend_from_slice(&buffer[..n]);
        }
    }
}

#[tokio::test]
async fn a_streamed_answer_leaves_its_connection_to_the_next_request() {
    let server = server().await;
    let body = with(completion("Once upon a time", 5), json!({ "stream": true }));
    post_over_one_connection(&server, "/completion", &body, b"\r\n0\r\n\r\n", 3);
}

#[tokio::test]
async fn a_held_back_call_ends_with_the_completion_that_is_cancelled() {
    let server = server().await;
    let key = new_key();
    let drafter = Drafter::new(&server, &key);
    let body = with(completion("Once upon a time", 500), json!({ "stream": true }));
    let url = format!("{}/completion", server.url());
    let client = reqwest::Client::new();
    let request = client.post(url).header("X-Draft-Key", &key).json(&body).send();
    let (stream, answer) = tokio::join!(request, drafter.attach());
    let stream = stream.expect("an answer");
    let (answer, ()) = tokio::join!(
        async {
            let mut pos = answer.tokens.len();
            loop {
                // the drafter is alive and slow: the slot is held all the time
                let more = json!({ "pos": pos, "tokens": [], "n_min": 1, "hold_us": 1_000_000, "wait": true });
                let answer = drafter.call(more).await;
                pos += answer.tokens.len();
                if answer.state == "done" {
                    break answer;
                }
            }
        },
        async { drop(stream) }
    );
    assert!(answer.n_steps < 100, "{answer:?}");
    // the slot is free
    assert_eq!(
        server.post("/completion", &completion("Once", 3)).await["tokens"]
            .as_array()
            .map(Vec::len),
        Some(3)
    );
}

#[tokio::test]
async fn a_server_that_stops_lets_its_drafters_go() {
    let server = server().await;
    let key = new_key();
    let drafter = Drafter::new(&server, &key);
    let body = completion("Once upon a time", 500);
    let stop = async {
        let mut pos = drafter.attach().await.tokens.len();
        // the slot has its first token and is held
        loop {
            let answer = drafter.hold_on(pos).await;
            pos += answer.tokens.len();
            if answer.n_steps > 0 {
                break;
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        server.signal(rustix::process::Signal::TERM);
        // far ahead: nothing but the end answers it
        let call = json!({ "key": key, "pos": pos + 1000, "wait": true });
        let _ = reqwest::Client::new()
            .post(format!("{}/draft", server.url()))
            .json(&call)
            .send()
            .await;
    };
    let stopped = async {
        tokio::select! {
            // the client goes away with it
            _ = server.send("/completion", &body, Some(&key)) => {}
            () = stop => {}
        }
    };
    tokio::time::timeout(Duration::from_secs(10), stopped)
        .await
        .expect("the held-back call was answered");
    let begin = Instant::now();
    while server.is_alive() {
        assert!(begin.elapsed() < Duration::from_secs(10), "it still runs");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_drafter_keeps_its_connection_for_more_than_a_hundred_calls() {
    let server = server().await;
    post_over_one_connection(&server, "/draft", &json!({ "key": "a" }), b"}", 250);
}

#[tokio::test]
async fn a_client_that_goes_away_frees_its_slot_while_a_stream_goes_on() {
    let server = server_with(&["-np", "2", "--context-shift"]).await;
    let endless = with(completion("Once upon a time", 100_000), json!({ "ignore_eos": true }));
    let stream = reqwest::Client::new()
        .post(format!("{}/completion", server.url()))
        .json(&with(endless.clone(), json!({ "stream": true })))
        .send()
        .await
        .expect("a stream");
    let reading = tokio::spawn(stream.bytes());
    let given_up = tokio::time::timeout(Duration::from_millis(300), server.send("/completion", &endless, None)).await;
    assert!(given_up.is_err(), "the answer is not to be there yet");
    tokio::time::sleep(Duration::from_secs(3)).await;
    let (slots, streaming) = (server.busy_slots().await, !reading.is_finished());
    assert!(streaming, "the stream is to be still under way");
    assert_eq!(slots, 1, "the slot of the one that went away is busy");
}
