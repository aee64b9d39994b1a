//! Accepts connections and ends them.

use std::sync::Arc;
use std::time::Duration;

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::peer::Peer;
use super::router::{App, router};
use super::settings::Settings;
use super::target::TargetError;
use crate::engine::Engine;

/// A client that does not acknowledge what it is sent, or that we live, for so long is gone.
const GONE_AFTER: Duration = Duration::from_secs(60);

/// How long to wait after a connection could not be accepted, which mostly means that there are too many.
const BREATH: Duration = Duration::from_millis(100);

/// Why the proxy cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// There is no client for the target.
    #[error(transparent)]
    Target(#[from] TargetError),
}

/// How long streams have to tell their clients that they are cut off.
const FAREWELL: Duration = Duration::from_millis(200);

/// How long a client may take for the head of a request, the silence before it included.
const SLOWEST_HEAD: Duration = Duration::from_secs(120);

/// Serves on `listener` until `shutdown`; then takes no more requests, gives the running ones `settings.drain` to end,
/// and cuts the rest off: streams with an error event.
pub async fn serve(
    listener: TcpListener,
    settings: Settings,
    engine: Arc<Engine>,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let drain = settings.drain;
    let app = App::new(settings, engine)?;
    let cut_off = app.cut_off.clone();
    serve_router(listener, router(app), drain, shutdown, cut_off).await;
    Ok(())
}

/// As [`serve`], with any router, which `cut_off` tells that the rest is cut off.
pub(crate) async fn serve_router(
    listener: TcpListener,
    router: Router,
    drain: Duration,
    shutdown: CancellationToken,
    cut_off: CancellationToken,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((socket, _)) => {
                    connections.spawn(connection(socket, router.clone(), shutdown.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(BREATH).await;
                }
            },
        }
    }
    drop(listener);
    if !all_end_within(drain, &mut connections).await {
        tracing::warn!(connections = connections.len(), "cutting off what is still running");
        cut_off.cancel();
        all_end_within(FAREWELL, &mut connections).await;
        connections.shutdown().await;
    }
}

async fn all_end_within(patience: Duration, connections: &mut JoinSet<()>) -> bool {
    let all = async { while connections.join_next().await.is_some() {} };
    tokio::time::timeout(patience, all).await.is_ok()
}

/// Serves one connection. Dropping it drops its request, and with it what goes on at the target.
async fn connection(socket: TcpStream, router: Router, shutdown: CancellationToken) {
    if let Err(error) = tune(&socket) {
        tracing::debug!(%error, "a connection's options could not be set");
    }
    let router = router.layer(Extension(Peer::of(&socket)));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(SLOWEST_HEAD)
        .serve_connection(TokioIo::new(socket), TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection broke off");
    }
}

fn tune(socket: &TcpStream) -> std::io::Result<()> {
    socket.set_nodelay(true)?;
    let socket = SockRef::from(socket);
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(GONE_AFTER / 2)
            .with_interval(GONE_AFTER / 6),
    )?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(GONE_AFTER))?;
    Ok(())
}
