//! Accepts connections and ends them.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

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

/// Serves on `listener` until `shutdown`; then takes no more requests, gives the running ones `settings.drain` to end,
/// and cuts the rest off.
pub async fn serve(
    listener: TcpListener,
    settings: Settings,
    engine: Arc<Engine>,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let drain = settings.drain;
    serve_router(listener, router(App::new(settings, engine)?), drain, shutdown).await;
    Ok(())
}

/// As [`serve`], with any router.
pub(crate) async fn serve_router(listener: TcpListener, router: Router, drain: Duration, shutdown: CancellationToken) {
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
    let drained = tokio::time::timeout(drain, async { while connections.join_next().await.is_some() {} }).await;
    if drained.is_err() {
        tracing::warn!(connections = connections.len(), "cutting off what is still running");
        connections.shutdown().await;
    }
}

/// Serves one connection. Dropping it drops its request, and with it what goes on at the target.
async fn connection(socket: TcpStream, router: Router, shutdown: CancellationToken) {
    if let Err(error) = tune(&socket) {
        tracing::debug!(%error, "a connection's options could not be set");
    }
    let connection = http1::Builder::new().serve_connection(TokioIo::new(socket), TowerToHyperService::new(router));
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
