//! From discovery to the directory: what every proxy program subscribes with.

use ambit_api::security::Authorization;
use ambit_api::workload::Address;
use ambit_api::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use ambit_directory::{InvalidResource, Update as Change};
use ambit_identity::{ControlPlane, Credentials};
use ambit_xds::{BoxError, Connector, Rejected, Update};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

/// The control plane's channel, with our credentials on every call.
#[derive(Debug)]
pub struct Credentialed(pub ControlPlane);

impl Connector for Credentialed {
    type Service = InterceptedService<Channel, Credentials>;

    async fn connect(&mut self) -> Result<Self::Service, BoxError> {
        Ok(InterceptedService::new(self.0.channel(), self.0.credentials()))
    }
}

/// An address as a change of the directory.
pub fn address(update: Update<Address>) -> Change {
    match update {
        Update::Upsert { name, resource } => Change::Address { name, address: resource },
        Update::Remove { name } => Change::AddressRemoved { name },
    }
}

/// A policy as a change of the directory.
pub fn policy(update: Update<Authorization>) -> Change {
    match update {
        Update::Upsert { name, resource } => Change::Policy { name, policy: resource },
        Update::Remove { name } => Change::PolicyRemoved { name },
    }
}

/// What the directory rejected, for the control plane.
pub fn rejected(ambit_directory::Rejected { name, error }: ambit_directory::Rejected) -> Rejected {
    let type_url = match &error {
        InvalidResource::Policy(_) => AUTHORIZATION_TYPE_URL,
        _ => ADDRESS_TYPE_URL,
    };
    Rejected { type_url: type_url.to_owned(), name, reason: error.to_string() }
}
