//! Where QEMU plugs a device in: a stream of frames, each behind its length in four bytes, big endian.
//!
//! Whoever connects gets a port of the switch, if one is free, until the stream ends or makes no sense.

use core::future::poll_fn;
use std::io;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};

use super::{MAX_FRAME_LEN, Plug, Switch};

pub(super) async fn run(listener: TcpListener, switch: Arc<Switch>) {
    while let Ok((stream, _)) = listener.accept().await {
        if switch.is_full() {
            continue;
        }
        tokio::spawn(serve(stream, Switch::plug(&switch)));
    }
}

async fn serve(stream: TcpStream, plug: Plug) {
    let _ = stream.set_nodelay(true);
    let (from, to) = stream.into_split();
    // Either end ends both, and with them the port.
    tokio::select! {
        _ = receive(from, &plug) => {}
        _ = send(to, &plug) => {}
    }
}

async fn receive(mut stream: OwnedReadHalf, plug: &Plug) -> io::Result<()> {
    loop {
        let len = usize::try_from(stream.read_u32().await?).unwrap_or(usize::MAX);
        if len > MAX_FRAME_LEN {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut frame = vec![0; len];
        stream.read_exact(&mut frame).await?;
        plug.send(frame);
    }
}

async fn send(mut stream: OwnedWriteHalf, plug: &Plug) -> io::Result<()> {
    loop {
        poll_fn(|context| plug.poll_arrived(context)).await;
        while let Some(frame) = plug.fetch() {
            let len = u32::try_from(frame.len()).map_err(io::Error::other)?;
            stream.write_all(&[&len.to_be_bytes()[..], &frame].concat()).await?;
        }
    }
}
