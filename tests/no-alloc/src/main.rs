//! A whole client without `#[global_allocator]`: were anything in it to allocate, it would not link.
#![no_std]
#![no_main]

use core::panic::PanicInfo;

use ossicle_core::{
    Client, ClientBuffers, ClientGroup, ClientIdentity, ClientStep, Drive, PeerConfig, PublicKey, Rungs,
};
use rand_core::{TryCryptoRng, TryRng};

#[panic_handler]
fn panicked(_: &PanicInfo<'_>) -> ! {
    loop {}
}

/// Never run; only its type matters here.
struct Entropy(u32);

impl TryRng for Entropy {
    type Error = core::convert::Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Self::Error> {
        self.0 = self.0.wrapping_add(1);
        Ok(self.0)
    }

    fn try_next_u64(&mut self) -> Result<u64, Self::Error> {
        Ok(self.try_next_u32()?.into())
    }

    fn try_fill_bytes(&mut self, target: &mut [u8]) -> Result<(), Self::Error> {
        target.fill(1);
        Ok(())
    }
}

impl TryCryptoRng for Entropy {}

/// Everything that a device calls, reached from the entry point so that the linker keeps it.
#[unsafe(no_mangle)]
extern "C" fn main() -> usize {
    let (mut rx, mut tx, mut signature, mut group) = ([0; 1152], [0; 1024], [0; 256], ClientGroup::new());
    let modulus = core::hint::black_box([0xff; 256]);
    let Ok(key) = PublicKey::from_modulus(&modulus) else { return 1 };
    let identity = ClientIdentity { id: [1; 16], key_epoch: 0, key, server: key };
    let owner = PeerConfig { id: [2; 16], key, oldest: None };
    let buffers = ClientBuffers { rx: &mut rx, tx: &mut tx, signature: &mut signature };
    let Ok(mut client) = Client::<1>::new(identity, &[owner], buffers, &[3; 64]) else { return 2 };
    client.accept_invitations(0, &mut group);
    client.start(0);
    for _ in 0..core::hint::black_box(100) {
        match client.poll(&mut Entropy(0)) {
            Ok(ClientStep::Sign(statement)) => {
                core::hint::black_box(statement.digest());
                let _ = client.sign(&[0; 256]);
            }
            Ok(ClientStep::Verify { signature, .. }) => {
                core::hint::black_box(signature);
                let _ = client.verified(true);
            }
            Ok(ClientStep::Event(event)) => {
                core::hint::black_box(event);
            }
            Ok(_) => match client.io() {
                Ok(Some(io)) => {
                    core::hint::black_box(io.write);
                    let len = io.read.len();
                    let _ = client.read(len);
                }
                _ => return 3,
            },
            Err(_) => return 4,
        }
        let _ = client.send(0, Rungs::NONE, true, 0, b"21.50C led=1");
        client.start_in_group();
        let _ = client.send_to_group(Rungs::NONE, 0, b"21.50C led=1");
    }
    0
}
