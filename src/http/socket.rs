//! A client's socket with two deadlines, for a request to begin and for its head to be complete. It also tells a client that
//! has left from one that has only closed its sending side.
//!
//! Both end the client's side of the connection. To tell them apart, the socket sends a waiting client an interim response
//! (`100 Continue`, RFC 9110, section 15.2), which every client of HTTP/1.1 skips. The system of a client that has left
//! answers with a reset.

use std::io::{self, ErrorKind, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};

use super::limits::Limits;
use super::progress::{Phase, Progress};

/// The interim response.
const INTERIM: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
/// Pause between two checks whether a client that closed its sending side has left.
const LOOK: Duration = Duration::from_millis(20);
/// Checks between two interim responses.
const LOOKS_EACH: u32 = 250;

/// The socket of a connection.
#[derive(Debug)]
pub(super) struct Socket {
    stream: TcpStream,
    progress: Arc<Progress>,
    idle_time: Duration,
    head_time: Duration,
    /// Deadline of the phase, or time of the next check.
    alarm: Pin<Box<Sleep>>,
    /// Bytes of an answer may still have to be sent.
    unsent: bool,
    /// Number of checks since the client closed its sending side while it waited for an answer.
    half_closed: Option<u32>,
}

impl Socket {
    pub(super) fn new(stream: TcpStream, progress: Arc<Progress>, limits: &Limits) -> Self {
        Self {
            stream,
            progress,
            idle_time: limits.idle_time,
            head_time: limits.head_time,
            alarm: Box::pin(sleep(limits.idle_time)),
            unsent: false,
            half_closed: None,
        }
    }

    fn set_alarm(&mut self, after: Duration) {
        self.alarm.as_mut().reset(Instant::now() + after);
    }

    /// The client has closed its sending side: ready with an error or the end once it has left.
    fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match (self.progress.phase(), self.half_closed) {
            // The router may not have read the complete body yet.
            (Phase::Body | Phase::Waiting, None) => {
                self.half_closed = Some(0);
                self.set_alarm(LOOK);
            }
            (Phase::Body | Phase::Waiting | Phase::Answering, Some(_)) => {}
            _ => return Poll::Ready(Ok(())),
        }
        while self.progress.phase() != Phase::Answering {
            ready!(self.alarm.as_mut().poll(cx));
            let looks = self.half_closed.unwrap_or_default();
            if self.progress.phase() == Phase::Body {
                return Poll::Ready(Ok(())); // The client left in the middle of its body.
            }
            if let Some(error) = SockRef::from(&self.stream).take_error()? {
                return Poll::Ready(Err(error));
            }
            if looks.is_multiple_of(LOOKS_EACH) && !self.unsent {
                match self.stream.try_write(INTERIM) {
                    Ok(sent) if sent < INTERIM.len() => return Poll::Ready(Err(ErrorKind::WriteZero.into())),
                    Err(error) if error.kind() != ErrorKind::WouldBlock => return Poll::Ready(Err(error)),
                    _ => {}
                }
            }
            self.half_closed = Some(looks + 1);
            self.set_alarm(LOOK);
        }
        // From now on, sending the answer shows whether the client is still there.
        Poll::Pending
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let socket = &mut *self;
        let before = buffer.filled().len();
        let read = Pin::new(&mut socket.stream).poll_read(cx, buffer);
        match read {
            Poll::Pending => {
                if matches!(socket.progress.phase(), Phase::Idle | Phase::Head) {
                    ready!(socket.alarm.as_mut().poll(cx));
                    return Poll::Ready(Err(ErrorKind::TimedOut.into()));
                }
                Poll::Pending
            }
            Poll::Ready(Ok(())) if buffer.filled().len() == before => socket.poll_ended(cx),
            Poll::Ready(Ok(())) => {
                if socket.progress.phase() == Phase::Idle {
                    socket.progress.head_begins();
                    socket.set_alarm(socket.head_time);
                }
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.unsent = true;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.unsent = true;
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// Called when all bytes have been sent.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        self.unsent = false;
        if self.progress.phase() == Phase::Answered {
            self.progress.rests();
            let idle_time = self.idle_time;
            self.set_alarm(idle_time);
            // The next read comes only after a wake-up: register the alarm, and wake now if the end came before.
            if self.alarm.as_mut().poll(cx).is_ready() || self.half_closed.is_some() {
                cx.waker().wake_by_ref();
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
