//! An event stream on its way from the target to the client, with the proxy in between and without.
//!
//! Target, proxy and client share one thread, so a time is the processor time of all of them.

use std::convert::Infallible;
use std::error::Error;
use std::future::IntoFuture;

use axum::Router;
use axum::body::Body;
use axum::http::header::CONTENT_TYPE;
use axum::routing::post;
use bytes::Bytes;
use criterion::{Criterion, Throughput};
use futures_util::stream;
use tightwad::config::{self, Upstream};
use tightwad::engine::{self, Engine};
use tightwad::http::client;
use tightwad::proxy::{self, Settings};
use tokio::net::TcpListener;
use tokio::runtime;
use tokio_util::sync::CancellationToken;

const PATH: &str = "/v1/chat/completions";
const REQUEST: &str = r#"{"messages": [{"role": "user", "content": "Hello."}], "stream": true}"#;
const EVENT: &[u8] =
    b"data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\
    \"choices\":[{\"index\":0,\"finish_reason\":null,\"delta\":{\"content\":\" token\"}}]}\n\n";
/// Events of an answer.
const EVENTS: usize = 1000;

fn main() -> Result<(), Box<dyn Error>> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    let (target, proxy) = runtime.block_on(servers())?;
    let client = client::builder().build()?;
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("relay");
    group.throughput(Throughput::Elements(EVENTS as u64));
    for (way, server) in [("target_alone", target), ("through_the_proxy", proxy)] {
        let url = format!("{server}{PATH}");
        group.bench_function(way, |bencher| {
            bencher
                .to_async(&runtime)
                .iter(async || assert_eq!(answer(&client, &url).await.ok(), Some(EVENTS * EVENT.len())));
        });
    }
    group.finish();
    criterion.final_summary();
    Ok(())
}

/// The URLs of a target that streams, and of a proxy in front of it.
async fn servers() -> Result<(String, String), Box<dyn Error>> {
    let answer = async || {
        let events = std::iter::repeat_n(Ok::<_, Infallible>(Bytes::from_static(EVENT)), EVENTS);
        (
            [(CONTENT_TYPE, "text/event-stream")],
            Body::from_stream(stream::iter(events)),
        )
    };
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let target = format!("http://{}", listener.local_addr()?);
    tokio::spawn(axum::serve(listener, Router::new().route(PATH, post(answer))).into_future());

    let settings = Settings::try_from(&config::Proxy {
        target: Some(Upstream::at(&target)),
        ..config::Proxy::default()
    })?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let proxy = format!("http://{}", listener.local_addr()?);
    let engine = Engine::start(engine::Settings::default())?;
    tokio::spawn(proxy::serve(listener, settings, engine, CancellationToken::new()));
    Ok((target, proxy))
}

/// Asks for an answer and returns its length in bytes.
async fn answer(client: &reqwest::Client, url: &str) -> reqwest::Result<usize> {
    let mut response = client.post(url).body(REQUEST).send().await?.error_for_status()?;
    let mut length = 0;
    while let Some(chunk) = response.chunk().await? {
        length += chunk.len();
    }
    Ok(length)
}
