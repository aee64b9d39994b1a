//! Accepts connections, hands their requests to a router, and shuts down.
//!
//! Every request passes this file first. Dropping a connection drops its request, and with it the request to the server
//! behind.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response, Version};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::body::{Memory, PacedBody, TrackedBody};
use super::limits::{ConnectionLimiter, ConnectionPermit, Limits};
use super::peer::Peer;
use super::progress::Progress;
use super::socket::Socket;

/// A client that acknowledges neither data nor keep-alive probes for this time is gone.
const GONE_AFTER: Duration = Duration::from_secs(60);
/// Pause after a connection could not be accepted, mostly because there are too many.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Time in which streams send their last error event when they are cut off.
const FAREWELL: Duration = Duration::from_millis(200);
/// Most bytes of a head, and of one read of a body.
const READ_BUFFER: usize = 128 * 1024;
/// Time in which a client that is turned away has to read its answer, and how many may do so at once.
const TURNING_AWAY: (Duration, usize) = (Duration::from_secs(1), 64);

/// Marks a request for which there is no connection left. [`origin::guarded`](super::origin::guarded) answers it, because a
/// web page reads no answer without its headers.
#[derive(Debug, Clone, Copy)]
pub(super) struct TurnedAway;

/// How a server runs and when it shuts down.
#[derive(Debug)]
pub(crate) struct ServeOptions {
    /// Limits towards its clients.
    pub(crate) limits: Limits,
    /// How long running answers may go on after `shutdown`.
    pub(crate) drain: Duration,
    /// Cancelled when the server takes no more requests.
    pub(crate) shutdown: CancellationToken,
    /// Cancelled when the remaining answers are cut off.
    pub(crate) cut_off: CancellationToken,
}

/// Serves on `listener` until the shutdown; then takes no more requests, waits up to `drain` for running answers, and cuts
/// off the rest.
pub(crate) async fn serve(listener: TcpListener, router: Router, options: ServeOptions) {
    let server = Arc::new(Server {
        limiter: ConnectionLimiter::new(options.limits),
        router,
        shutdown: options.shutdown,
        turning_away: Semaphore::new(TURNING_AWAY.1),
    });
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = server.shutdown.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    connections.spawn(Arc::clone(&server).connection(stream, peer));
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    server.limiter.make_room();
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    if !all_end_within(options.drain, &mut connections).await {
        tracing::warn!(connections = connections.len(), "cutting off what is still running");
        options.cut_off.cancel();
        all_end_within(FAREWELL, &mut connections).await;
        connections.shutdown().await;
    }
}

async fn all_end_within(time: Duration, connections: &mut JoinSet<()>) -> bool {
    let all = async { while connections.join_next().await.is_some() {} };
    tokio::time::timeout(time, all).await.is_ok()
}

/// State that all connections share.
struct Server {
    router: Router,
    limiter: Arc<ConnectionLimiter>,
    shutdown: CancellationToken,
    turning_away: Semaphore,
}

impl Server {
    /// Serves one connection, or turns it away.
    async fn connection(self: Arc<Self>, stream: TcpStream, peer: SocketAddr) {
        match self.limiter.take(peer.ip()) {
            Some(permit) => self.requests(stream, permit).await,
            None => self.turn_away(stream).await,
        }
    }

    async fn requests(&self, stream: TcpStream, permit: ConnectionPermit) {
        if let Err(error) = tune(&stream) {
            tracing::debug!(%error, "a connection's options could not be set");
        }
        let peer = Peer::of(&stream);
        let (evicted, memory) = (permit.evicted(), permit.body_memory());
        let progress = Arc::new(Progress::new(permit));
        let socket = Socket::new(stream, Arc::clone(&progress), self.limiter.limits());
        let router = TowerToHyperService::new(self.router.clone());
        let service = service_fn(|request| self.answer(&router, request, (peer, memory.clone()), &progress));
        let connection = http1::Builder::new()
            .max_buf_size(READ_BUFFER)
            .serve_connection(TokioIo::new(socket), service);
        let mut connection = std::pin::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = evicted.cancelled() => return,
            () = self.shutdown.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a connection broke off");
        }
    }

    fn answer(
        &self,
        router: &TowerToHyperService<Router>,
        request: Request<Incoming>,
        (peer, memory): (Peer, Memory),
        progress: &Arc<Progress>,
    ) -> impl Future<Output = Result<Response<TrackedBody>, Infallible>> + use<> {
        progress.request_begins();
        let progress = Arc::clone(progress);
        let interim = request.version() >= Version::HTTP_11;
        let limits = self.limiter.limits();
        let mut request = request.map(|body| Body::new(PacedBody::new(body, limits, &progress, interim)));
        request.extensions_mut().insert(memory);
        request.extensions_mut().insert(peer);
        let answer = router.call(request);
        async move {
            let answer = answer.await?;
            progress.answer_begins();
            Ok(answer.map(|body| TrackedBody::new(body, progress)))
        }
    }

    /// Answers the first request of a client for whom there is no connection left.
    async fn turn_away(&self, stream: TcpStream) {
        let Ok(_turn) = self.turning_away.try_acquire() else {
            return;
        };
        let router = TowerToHyperService::new(self.router.clone());
        let service = service_fn(|request: Request<Incoming>| {
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(TurnedAway);
            router.call(request)
        });
        let connection = http1::Builder::new()
            .keep_alive(false)
            .max_buf_size(READ_BUFFER)
            .serve_connection(TokioIo::new(stream), service);
        let _ = tokio::time::timeout(TURNING_AWAY.0, connection).await;
    }
}

fn tune(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let stream = SockRef::from(stream);
    stream.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(GONE_AFTER / 2)
            .with_interval(GONE_AFTER / 6),
    )?;
    #[cfg(target_os = "linux")]
    stream.set_tcp_user_timeout(Some(GONE_AFTER))?;
    Ok(())
}
